"""Tables of the README and of the model cards, written from the JSON files that the benchmarks leave: tools/tables.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`. With --check nothing is written, and a table that differs from its file is an error."""
import json, re, sys
from pathlib import Path
import calm                                             # before anything loads torch
from unclip_nb.evaluation import wilson

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "data/tiny/README.md")
ROUTES = ("diffusion prior", "ar prior", "true z_i", "z_t as z_i")
KINDS = ("one object", "two objects", "unseen pairs")

def rows(*lines):
    "Lines of cells as a table in Markdown."
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])

def results():
    "The share of captions drawn right, by route and kind of caption."
    found = json.loads((ROOT/"data/tiny/scores.json").read_text())
    def share(kind, route):
        marks = found["marks"][f"{kind}, {route}"]
        right, asked = marks["right"]["all"], marks["asked"]["all"]
        low, high = (round(100 * x) for x in wilson(right, asked))
        return f"{100 * right / asked:.0f} % ({low} to {high})"

    return rows(("z_i from", *KINDS),
                *((route, *(share(kind, route) for kind in KINDS)) for route in ROUTES))

def edits():
    "Edits by words at the best theta: changed, everything else kept, and in place."
    found = json.loads((ROOT/"data/tiny/edits.json").read_text())["rows"]
    lines = []
    for kind in ("color", "shape", "size", "background"):
        mine = [r for r in found if r["kind"] == kind and r["base"] == "described"]
        best = max(mine, key=lambda r: r["both"])
        lines.append((kind, f"{best['theta']:g}", *(f"{best[k]} of {best['n']}"
                                                    for k in ("changed", "both", "place"))))
    return rows(("attribute", "theta", "changed", "and the rest kept", "and in place"), *lines)

TABLES = {"results": results, "edits": edits}

def filled(text, where):
    "The page with all its tables as they should be."
    def one(match):
        if match[1] not in TABLES:
            raise SystemExit(f"{where}: no table is called {match[1]!r}")
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", one, text, flags=re.S)

if __name__ == "__main__":
    stale = []
    for page in PAGES:
        old = (ROOT/page).read_text(encoding="utf-8")
        new = filled(old, page)
        if new != old:
            stale.append(page)
        if "--check" not in sys.argv:
            (ROOT/page).write_text(new, encoding="utf-8")
    if "--check" in sys.argv and stale:
        raise SystemExit(f"make tables: {', '.join(stale)} differ from their JSON files")

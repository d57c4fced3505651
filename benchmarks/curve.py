"""What an hour of training buys: the judge's score against time. `python benchmarks/curve.py WEIGHTS OUT [NAME=RUN ...] [N]`

WEIGHTS: a system (its CLIP, its upsampler). Each RUN is a decoder's folder whose checkpoints were kept (`--decoder.train.keep 1000`). The average of each checkpoint draws N true z_i with captions of every
kind (guidance 2, 20 steps of DPM-Solver++, 128 px, seed 0). Writes OUT.json and OUT.png; what OUT.json already holds is not measured again."""
import json, sys
from pathlib import Path
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from unclip_nb.decoder import Decoder, DecoderConfig
from unclip_nb.evaluation import KINDS, take_exam, wilson
from unclip_nb.pipeline import UnCLIP
from unclip_nb.train import checkpoints, config_from, load_weights

def score(model:UnCLIP, checkpoint:Path, n:int) -> dict:
    "The marks of one checkpoint: step, seconds of training, and how many of n were right, by kind."
    state = json.loads((checkpoint / "state.json").read_text())
    model.decoder = Decoder(config_from(DecoderConfig, state["model"])).eval()
    load_weights(model.decoder, load_file(checkpoint / "ema.safetensors"), checkpoint)
    marks = {kind: take_exam(model, kind, n, "true z_i")[0] for kind in KINDS}
    return dict(step=state["step"], seconds=round(state["seconds"]), pictures=state["step"] * state["train"]["batch_size"] * state["train"]["accumulate"] * state["processes"],
                n=n, **{kind: {a: m.right[a] for a in m.right if m.asked[a]} for kind, m in marks.items()})

def plot(runs:dict[str, list], file:Path):
    "A panel a kind of caption, a line a run, with 95 % intervals."
    fig = Figure(figsize=(10, 3), dpi=110, layout="constrained")
    for ax, kind in zip(fig.subplots(1, 3, sharey=True), KINDS):
        for name, rows in runs.items():
            x, y = [r["seconds"] / 60 for r in rows], [100 * r[kind]["all"] / r["n"] for r in rows]
            ax.plot(x, y, marker=".", label=name)
            ax.fill_between(x, *zip(*([100 * v for v in wilson(r[kind]["all"], r["n"])] for r in rows)), alpha=0.2)
        ax.set(title=kind, xlabel="minutes of the decoder's training", ylim=(0, 100)); ax.grid(alpha=0.3)
    fig.axes[0].set_ylabel("everything right, %"); fig.axes[0].legend()
    fig.savefig(file)

if __name__ == "__main__":
    n = int(sys.argv.pop()) if sys.argv[-1].isdigit() else 96
    weights, out, *named = sys.argv[1:]
    out = Path(out); table = out.with_suffix(".json")
    runs, model = json.loads(table.read_text()) if table.exists() else {}, UnCLIP.from_pretrained(weights)
    for name, run in (x.split("=", 1) for x in named):
        rows = runs.setdefault(name, [])
        for c in checkpoints(run):
            if any(r["step"] == int(c.name[5:]) and r["n"] == n for r in rows): continue
            rows.append(row := score(model, c, n)); rows.sort(key=lambda r: r["step"])
            print(name, f"{row['seconds'] / 60:.0f} min", {k: row[k]["all"] for k in KINDS}, flush=True)
            table.write_text(json.dumps(runs, indent=1) + "\n")
    plot(runs, out.with_suffix(".png"))

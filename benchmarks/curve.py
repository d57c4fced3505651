"""What an hour of training buys: the judge's score against the pictures that the decoder has seen. `python benchmarks/curve.py OUT.json OUT.png [NAME=SYSTEM ...] [N]`

Each SYSTEM is a folder that `unclip train` wrote, its decoder's checkpoints kept (`--decoder.train.keep 1000`); an upsampler that it lacks is the shipped one. The average of each checkpoint draws N captions of every
kind from the true z_i and from the diffusion prior (guidance 2, 20 steps of DPM-Solver++, 128 px, seed 0). What OUT.json already holds is not measured again; without systems it is drawn as it is."""
import json, sys
from pathlib import Path
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from unclip_nb.clip import CLIP
from unclip_nb.core import data_path
from unclip_nb.decoder import Decoder, DecoderConfig
from unclip_nb.diffusion_prior import DiffusionPrior
from unclip_nb.evaluation import KINDS, take_exam, wilson
from unclip_nb.pipeline import UnCLIP
from unclip_nb.train import checkpoints, config_from, load_weights
from unclip_nb.upsampler import Upsampler

ROUTES = ("true z_i", "diffusion prior")

def system(folder:Path, checkpoint:Path) -> tuple[UnCLIP, dict]:
    "A system with the averaged decoder of a checkpoint, and the state of its training."
    state = json.loads((checkpoint / "state.json").read_text())
    decoder = Decoder(config_from(DecoderConfig, state["model"])).eval()
    load_weights(decoder, load_file(checkpoint / "ema.safetensors"), checkpoint)
    up = folder / "upsampler1" if (folder /
                                   "upsampler1").exists() else data_path("tiny") / "upsampler1"
    return UnCLIP(CLIP.from_pretrained(folder / "clip"),
                  DiffusionPrior.from_pretrained(folder / "prior"), decoder,
                  Upsampler.from_pretrained(up)), state

def score(folder:Path, checkpoint:Path, n:int) -> dict:
    "The marks of one checkpoint: step, pictures, seconds of training, and how many of n were right, by route and kind."
    model, state = system(folder, checkpoint)
    train = state["train"]
    return dict(step=state["step"],
                seconds=round(state["seconds"]),
                pictures=state["step"] * train["batch_size"] * train["accumulate"] *
                state["processes"],
                n=n,
                **{
                    route: {kind: take_exam(model, kind, n, route)[0].right
                            for kind in KINDS}
                    for route in ROUTES
                })

def plot(runs:dict[str, list], file:Path):
    "A panel a kind of caption, a line a run and route, with 95 % intervals. On top: minutes, at the 100 pictures a second of two CPU cores."
    fig = Figure(figsize=(10, 4), dpi=90, layout="constrained")
    for ax, kind in zip(fig.subplots(1, 3, sharey=True), KINDS):
        for (name, rows), color in zip(runs.items(), ("tab:blue", "tab:orange", "tab:green")):
            for route, style in zip(ROUTES, (":", "-")):
                x, y = [r["pictures"] / 1000
                        for r in rows], [100 * r[route][kind]["all"] / r["n"] for r in rows]
                ax.plot(x,
                        y,
                        style,
                        color=color,
                        marker=".",
                        label=f"{name}, {route.replace('z_i', '$z_i$')}")
            ax.fill_between(x,
                            *zip(*([100 * v for v in wilson(r[route][kind]["all"], r["n"])]
                                   for r in rows)),
                            color=color,
                            alpha=0.15,
                            lw=0)
        ax.set(title=kind, xlabel="thousand pictures", ylim=(0, 101))
        ax.grid(alpha=0.3)
        ax.secondary_xaxis("top",
                           functions=(lambda x: x / 6, lambda x: x * 6)).tick_params(labelsize=7)
    fig.axes[0].set_ylabel("everything right, %")
    fig.legend(*fig.axes[0].get_legend_handles_labels(),
               loc="outside upper center",
               ncol=2,
               fontsize=8)
    fig.savefig(file)

if __name__ == "__main__":
    n = int(sys.argv.pop()) if sys.argv[-1].isdigit() else 96
    table, picture, *named = sys.argv[1:]
    runs = json.loads(Path(table).read_text()) if Path(table).exists() else {}
    for name, folder in (x.split("=", 1) for x in named):
        rows = runs.setdefault(name, [])
        for c in checkpoints(Path(folder) / "decoder"):
            if any(r["step"] == int(c.name[5:]) for r in rows):
                continue
            rows.append(row := score(Path(folder), c, n))
            rows.sort(key=lambda r: r["step"])
            print(name,
                  row["step"],
                  {route: {k: row[route][k]["all"]
                           for k in KINDS}
                   for route in ROUTES},
                  flush=True)
            Path(table).write_text(json.dumps(runs) + "\n")
    plot(runs, Path(picture))

"""The pictures of the README, drawn from the shipped weights: tools/face.py [--weights tiny] [--out nbs/images]

edit.gif: three pictures edited by words, theta back and forth. figures.jpg: our counterparts of four figures of the paper. map.png: the four networks.
Takes about a minute on two cores."""
import argparse
from pathlib import Path
import calm                                             # before anything loads torch
import torch
from PIL import Image, ImageDraw, ImageFont
from unclip_nb.core import image_grid, to_pil
from unclip_nb.edits import interpolate, pca_sweep, text_diff, variations
from unclip_nb.pipeline import UnCLIP
from unclip_nb.shapes import EIGHT_SCENES, render

EDITS = (("a large yellow circle", "a large red circle", 1),
         ("a gray background", "a brown background", 2),
         ("a small object", "a large object", 5))
FONT = 15

def edit_strip(model, out, frames=13):
    "Three pictures side by side, each turned towards its words and back."
    thetas = [0.4 * k / (frames - 1) for k in range(frames)]
    rows = [
        text_diff(model, model.invert(render(EIGHT_SCENES[i], 128), refine=1), a, b, thetas=thetas)
        for a, b, i in EDITS
    ]
    font = ImageFont.load_default(size=FONT)
    sheets = []
    for k in range(frames):
        sheet = Image.new("RGB", (3 * 236 - 12, 250), "white")
        draw = ImageDraw.Draw(sheet)
        for j, ((a, b, _), row) in enumerate(zip(EDITS, rows)):
            sheet.paste(to_pil(row[k]).resize((192, 192), Image.LANCZOS), (236 * j + 16, 4))
            for line, text in enumerate((a, f"to {b}")):
                draw.text((236 * j + 16, 202 + 20 * line), text, fill="black", font=font)
        sheets.append(sheet.quantize(128))
    loop = [sheets[0]] * 4 + sheets + [sheets[-1]] * 6 + sheets[::-1]
    loop[0].save(out, save_all=True, append_images=loop[1:], duration=90, loop=0, optimize=True)

def figures(model, out):
    "Our counterparts of the paper's figures 3, 4, 5 and 7, a row each."
    picture, other = render(EIGHT_SCENES[1], 128), render(EIGHT_SCENES[5], 128)
    latent = model.invert(picture, refine=1)
    rows = {
        "Figure 3: variations": torch.cat([picture,
                                           variations(model, latent, n=6, eta=1.0)]),
        "Figure 4: interpolation": interpolate(model, picture, other, n=7),
        "Figure 5: text diff": text_diff(model,
                                         latent,
                                         "a large yellow circle",
                                         "a large red circle",
                                         thetas=[k / 15 for k in range(7)]),
        "Figure 7: first k components": pca_sweep(model, latent, ks=(1, 2, 4, 8, 16, 32, 96))
    }
    font = ImageFont.load_default(size=FONT)
    sheet = Image.new("RGB", (7 * 102 + 6, len(rows) * 130), "white")
    for k, (name, images) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((6, 130 * k + 4), name, fill="black", font=font)
        sheet.paste(image_grid(images, cols=7, height=96), (0, 130 * k + 22))
    sheet.save(out, quality=88)

def diagram(out):
    "The four networks and what travels between them."
    import matplotlib.pyplot as plt
    boxes = (("CLIP", "05_clip", "#dbe9f6"), ("prior", "07_ar_prior\n09_diffusion_prior",
                                              "#e3f1dd"), ("decoder", "11_decoder", "#fbe8d3"),
             ("upsampler", "13_upsampler", "#f3dfee"))
    arrows = ("caption", "$z_t$", "$z_i$", "32 px", "128 px")
    fig, ax = plt.subplots(figsize=(12, 1.9), dpi=100)
    ax.set(xlim=(-1, 10.3), ylim=(0, 2))
    ax.axis("off")
    for k, (name, notebook, color) in enumerate(boxes):
        ax.add_patch(
            plt.Rectangle((1 + 2.25 * k, 0.45), 1.35, 1.05, facecolor=color, edgecolor="#555555"))
        ax.text(1.675 + 2.25 * k, 1.2, name, ha="center", va="center", fontsize=13)
        ax.text(1.675 + 2.25 * k,
                0.78,
                notebook,
                ha="center",
                va="center",
                fontsize=7.5,
                color="#444444")
    for k, text in enumerate(arrows):
        ax.annotate("", (0.95 + 2.25 * k, 1), (0.15 + 2.25 * k, 1),
                    arrowprops=dict(arrowstyle="->", color="#555555"))
        ax.text(0.55 + 2.25 * k, 1.18, text, ha="center", fontsize=10)
    for x in (3.9, 6.15):
        ax.annotate("", (x, 0.42), (1.1, 0.12),
                    arrowprops=dict(arrowstyle="->",
                                    color="#999999",
                                    connectionstyle="arc3,rad=0.12"))
    ax.text(1.0,
            0.12,
            "the caption's words, too",
            ha="right",
            va="center",
            fontsize=9,
            color="#555555")
    fig.savefig(out, bbox_inches="tight")

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--out", default="nbs/images")
    args = parser.parse_args()
    out, model = Path(args.out), UnCLIP.from_pretrained(args.weights, device="cpu")
    diagram(out/"map.png")
    edit_strip(model, out/"edit.gif")
    figures(model, out/"figures.jpg")
    print({
        f.name: f"{f.stat().st_size / 1000:.0f} kB"
        for f in (out / "map.png", out / "edit.gif", out / "figures.jpg")
    })

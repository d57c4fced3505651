"Install the Debian packages that some tests need, where they are missing and we may: tools/debian.py. Where we may not, those tests say why they skip."
import os, shutil, subprocess
import calm                                             # before anything loads torch
from PIL import features
from unclip_nb.emoji import find_noto

NEEDED = {"fonts-noto-color-emoji": find_noto, "libfribidi0": lambda: features.check("raqm")}

if __name__ == "__main__":
    missing = [package for package, found in NEEDED.items() if not found()]
    if missing and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"]
        for words in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            subprocess.run(apt + words,
                           env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                           capture_output=True)
    for package in missing:
        if not NEEDED[package]():
            print(f"{package} is not installed: the tests that need it are skipped")

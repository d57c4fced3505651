"unCLIP (DALL-E 2) built piece by piece in notebooks. Written by hand, as `__main__.py` is; the other modules are exported from nbs/."
__version__ = "0.0.1"

def __getattr__(name):
    "`from unclip_nb import UnCLIP` loads the pipeline; `import unclip_nb` alone stays as quick as reading this file."
    if name == "UnCLIP":
        from .pipeline import UnCLIP
        return UnCLIP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

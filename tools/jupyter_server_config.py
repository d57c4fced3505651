"""A Jupyter server of this environment saves the repository's notebooks without what JupyterLab adds to a file that nobody changed:
`language_info`, the kernel's display name, folded headings, timings, the state of widgets. `make setup` copies this file to etc/jupyter of
the environment. Counts and outputs stay: whether a notebook shows one fresh run is the tests' question (nbdev's own hook empties the counts)."""
from pathlib import Path

KERNEL = dict(display_name='python3', language='python', name='python3')
KEPT, CELLS_KEPT = ('kernelspec',), ('tags',)
WITHOUT_KERNEL = 'application/vnd.jupyter.widget-view+json'            # random ids, of no use without a kernel

def strip(nb):
    "Take away what is no part of the lesson; `nb` is the notebook's JSON."
    nb['metadata'] = {k: v
                      for k, v in nb['metadata'].items() if k in KEPT} | dict(kernelspec=KERNEL)
    for cell in nb['cells']:
        cell['metadata'] = {k: v for k, v in cell['metadata'].items() if k in CELLS_KEPT}
        for output in cell.get('outputs', []):
            output.get('data', {}).pop(WITHOUT_KERNEL, None)

def strip_before_saving(model, path='', contents_manager=None, **kwargs):
    "Jupyter's `pre_save_hook`: the notebooks of this repository only, wherever the server was started."
    if model['type'] != 'notebook' or model['content']['nbformat'] != 4:
        return
    file = Path(getattr(contents_manager, 'root_dir', '.'))/path.lstrip('/')
    if any(p.name == 'nbs' and (p/'index.ipynb').exists() for p in file.parents):
        strip(model['content'])

c.ContentsManager.pre_save_hook = strip_before_saving                  # noqa: F821  (Jupyter brings `c`)

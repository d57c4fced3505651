"Re-run notebooks in a fresh kernel and store their outputs, leaving only what a reader needs: tools/nbrun.py [--tidy] [NOTEBOOK ...]"
import base64, io, re, sys, time
from pathlib import Path
import calm                                             # before anything loads torch
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from execnb.nbio import read_nb, write_nb
from PIL import Image

SKIP = re.compile(r'^#\|\s*(eval:\s*false|slow)\b', re.M | re.I)
DEAD = ('application/vnd.jupyter.widget-view+json',)    # random ids, of no use without a kernel

class Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == 'code' and SKIP.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)

def refresh(fn, timeout=600):
    "Run `fn` top to bottom in its own folder and store it; a cell that fails leaves the file as it was"
    t0, nb = time.time(), nbformat.read(fn, as_version=4)
    Client(nb, timeout=timeout, kernel_name='python3', record_timing=False, coalesce_streams=True,
           resources={'metadata': {'path': str(Path(fn).parent)}}).execute()
    nbformat.write(nb, fn)
    tidy(fn)
    print(f'{fn}: {time.time()-t0:.1f} s, {Path(fn).stat().st_size/1024:.0f} KB', flush=True)

def lighter(png, least=12_000):
    "A plot as a PNG of 64 colours: a third of the size, and no eye sees it"
    raw, out = base64.b64decode(png), io.BytesIO()
    if len(raw) < least:
        return png
    if Image.open(io.BytesIO(raw)).mode == 'P':
        return png                   # light already
    Image.open(io.BytesIO(raw)).convert('RGB').quantize(64).save(out, 'PNG', optimize=True)
    return base64.b64encode(out.getvalue()).decode() + '\n' if len(
        out.getvalue()) < 0.8 * len(raw) else png

def tidy(fn):
    "`nbdev_clean`, but run cells keep the count 1..n that nbval needs to see"
    cfg, nb = get_config(), read_nb(fn)
    ran = [
        c.cell_type == 'code' and (bool(c.outputs) or c.execution_count is not None)
        for c in nb.cells
    ]
    clean_nb(nb,
             allowed_metadata_keys=cfg.allowed_metadata_keys.split(),
             allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split(),
             clean_ids=cfg.clean_ids)
    for k in ('widgets', 'jupytext'):
        nb.metadata.pop(k, None)
    nb.metadata['kernelspec'] = dict(display_name='python3', language='python', name='python3')         # or JupyterLab asks for one
    for n, c in enumerate((c for c, r in zip(nb.cells, ran) if r), 1):
        c.execution_count = n
        for o in c.outputs:
            data = o.get('data', {})
            for k in DEAD:
                data.pop(k, None)
            if 'image/jpeg' in data:
                data.pop('image/png', None)            # PIL images come as both
            if 'image/png' in data:
                data['image/png'] = lighter(''.join(data['image/png']))
            if o['output_type'] == 'execute_result':
                o['execution_count'] = n
    write_nb(nb, fn)

if __name__ == '__main__':
    files = [a for a in sys.argv[1:] if a != '--tidy'] or sorted(
        str(p) for p in Path('nbs').glob('**/*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    if '--tidy' in sys.argv:
        sys.exit(any(map(tidy, files)))                # no run, only the cleaning that follows one
    failed = []
    for fn in files:
        try:
            refresh(fn)
        except CellExecutionError as e:
            failed.append(fn)
            print(f'{fn}: FAILED, left as it was\n{e}', file=sys.stderr)
    sys.exit(f'{len(failed)} failed: {" ".join(failed)}' if failed else 0)

"pytest and nbval: calm settings, jaxtyping's shapes checked at run time, `#|` directives honoured, floats and pictures compared with a tolerance, time per file."
import os, re, sys
from collections import defaultdict
from configparser import ConfigParser
from math import isclose
from pathlib import Path
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE/'tools'))
import calm                                             # before anything loads torch
import pictures

if os.environ.get('UNCLIP_TYPES', '1') != '0':          # annotated functions of the package check their arguments while tests run
    from jaxtyping import install_import_hook
    install_import_hook('unclip_nb', 'beartype.beartype')

cfg = ConfigParser(delimiters=['='])
cfg.read(HERE/'settings.ini')
FLAGS = ['eval:\\s*false'] + cfg['DEFAULT'].get('tst_flags', '').split()
SKIP = re.compile(rf'^#\|\s*({"|".join(FLAGS)})\s*$|nbdev_export\(', re.M | re.I)
UNSTABLE = re.compile(r'\bshow_doc\(|\binteract\(')
NUM = re.compile(r'[-+]?\d+\.\d*(?:e[-+]?\d+)?', re.I)
VARIES = "picture-varies"                               # the tag of a cell whose picture no two runs share
SECONDS = 30                                            # what a notebook may take

def close(a, b, rel=1e-3, abs=1e-4):
    "Same text, but for floats that differ only a little"
    skel = lambda s: re.sub(r'\s+', ' ', NUM.sub('#', s))
    return skel(a) == skel(b) and all(isclose(float(x), float(y), rel_tol=rel, abs_tol=abs)
                                      for x, y in zip(NUM.findall(a), NUM.findall(b)))

def pytest_configure(config):
    try:
        from nbval.plugin import IPyNbCell
    except ImportError:
        return
    opt = config.option
    opt.nbval_sanitize_with = opt.nbval_sanitize_with or str(HERE/'nbval_sanitize.cfg')
    opt.nbval_current_env = not opt.nbval_kernel_name
    opt.nbval_cell_timeout = min(opt.nbval_cell_timeout, 300)
    exact = IPyNbCell.compare_outputs
    def compare_outputs(self, test, ref, **kw):
        for t, r in zip(test, ref):
            for x, y in ((t, r), (t.get('data', {}), r.get('data', {}))):
                for k in {'text', 'text/plain', 'text/markdown', 'text/html'} & x.keys() & y.keys():
                    if close(x[k], y[k]):
                        x[k] = y[k]
        if not exact(self, test, ref, **kw):
            return False
        said = '' if VARIES in self.cell.metadata.get('tags', ()) else pictures.changed(ref, test)
        if said:
            self.comparison_traceback.append(said)
        return not said
    IPyNbCell.compare_outputs = compare_outputs

def both_hands():
    "Whether both hands of the emoji can be drawn here: their notebooks store what both show."
    from PIL import features
    from unclip_nb.emoji import find_noto
    return find_noto() and features.check('raqm')

def pytest_collection_modifyitems(items):
    emoji = [it for it in items if hasattr(it, 'cell') and it.path.stem == '19_emoji']
    if emoji and not both_hands():
        for it in emoji:
            it.add_marker(
                pytest.mark.skip(reason='fonts-noto-color-emoji and libfribidi0 are not installed'))
    for it in items:
        if not hasattr(it, 'cell'):
            continue
        src = it.cell.source
        if SKIP.search(src):
            it.options['skip'] = True
        if UNSTABLE.search(src):
            it.options['check'] = False
        if it.cell.execution_count is None:
            it.cell['execution_count'] = it.cell_num + 1

def pytest_terminal_summary(terminalreporter):
    spent = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for r in reports:
            if hasattr(r, 'duration'):
                spent[r.nodeid.split('::')[0]] += r.duration
    if len(spent) < 2:
        return
    terminalreporter.section('seconds per file')
    for f, s in sorted(spent.items(), key=lambda o: -o[1]):
        late = f'   more than {SECONDS} s' if f.endswith('.ipynb') and s > SECONDS else ''
        terminalreporter.write_line(f'{s:7.1f}  {f}{late}')

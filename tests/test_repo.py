"What holds for the repository as a whole: the package is what the notebooks export, in the order of their numbers, as they were run."
import ast, builtins, json, re, shutil, subprocess, symtable, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
LIB, NBS = ROOT/'unclip_nb', ROOT/'nbs'
LESSONS = sorted(NBS.glob('*.ipynb'))
NOTEBOOKS = LESSONS + sorted((NBS/'solutions').glob('*.ipynb'))
MODULES = {p.stem.partition('_')[2]: int(p.stem[:2]) for p in LESSONS if p.stem[:2].isdigit()}
EXPORTED = sorted(p for p in LIB.glob('*.py') if p.stem[0] != '_')
NOT_RUN = re.compile(r'^#\|\s*(eval:\s*false|slow)\b', re.M | re.I)
notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
lessons = pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
modules = pytest.mark.parametrize('path', EXPORTED, ids=lambda p: p.stem)

def cells(path, kind): return [c for c in json.loads(path.read_text('utf8'))['cells'] if c['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])

@pytest.fixture(scope='module')
def tracked():
    "What git tracks, or would with `git add .`"
    if not (ROOT/'.git').exists(): pytest.skip('not a git checkout')
    out = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({ROOT/f for f in out.stdout.split('\0') if f and (ROOT/f).is_file()})

# The package

def test_package_is_what_the_notebooks_export(tmp_path):
    for f in ('settings.ini', 'pyproject.toml', 'README.md', 'setup.py'): shutil.copy(ROOT/f, tmp_path/f)
    shutil.copytree(NBS, tmp_path/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (tmp_path/'unclip_nb').mkdir(); shutil.copy(LIB/'__init__.py', tmp_path/'unclip_nb')
    run = subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    read = lambda folder: {p.name: p.read_text('utf8') for p in folder.glob('*.py')}
    new, old = read(tmp_path/'unclip_nb'), read(LIB)
    assert sorted(new) == sorted(old), 'modules without a notebook, or notebooks never exported: make sync'
    assert not [f for f in new if new[f] != old[f]], 'differ from their notebooks: make sync'
    assert (tmp_path/'pyproject.toml').read_text() == (ROOT/'pyproject.toml').read_text()

def own_imports(tree):
    "Modules of this package that code imports, wherever the statement stands"
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom):
            if n.level or n.module == 'unclip_nb':
                yield from [n.module.split('.')[0]] if n.level and n.module else [a.name for a in n.names if a.name != '__version__']
            elif (n.module or '').startswith('unclip_nb.'): yield n.module.split('.')[1]
        elif isinstance(n, ast.Import):
            yield from (a.name.split('.')[1] for a in n.names if a.name.startswith('unclip_nb.'))

def test_own_imports_sees_every_form():
    code = 'from .a import x\nfrom . import b\nfrom unclip_nb.c import y\nfrom unclip_nb import d\ndef f():\n    import unclip_nb.e as z\nimport torch'
    assert sorted(own_imports(ast.parse(code))) == list('abcde')

@modules
def test_module_imports_only_smaller_numbers(path):
    later = [m for m in own_imports(ast.parse(path.read_text('utf8'))) if MODULES[m] >= MODULES[path.stem]]
    assert not later, f'{path.stem} ({MODULES[path.stem]:02}) imports {later}'

@lessons
def test_lesson_uses_nothing_of_a_later_one(path):
    if path.stem == 'index': pytest.skip('the tour uses all of them')
    number = int(path.stem[:2]) if path.stem[:2].isdigit() else -1          # one_page stands before all of them
    code = '\n'.join(re.sub(r'^\s*[%!].*$', '', source(c), flags=re.M) for c in cells(path, 'code'))
    assert not [m for m in own_imports(ast.parse(code)) if MODULES[m] > number]

def free_names(code, name='module'):
    "Names that a function or class body reads and neither it, the module nor Python defines"
    top = symtable.symtable(code, name, 'exec')
    known = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()} | set(dir(builtins))
    known |= {'__file__', '__name__', '__doc__', '__class__'}
    def walk(table):
        for s in table.get_symbols():
            if s.is_global() and s.is_referenced() and s.get_name() not in known: yield f'{table.get_name()}: {s.get_name()}'
        for child in table.get_children(): yield from walk(child)
    return sorted(set(walk(top)))

def test_free_names_sees_a_free_name():
    assert free_names('import os\ndef f(x): return [os.sep, x, cfg]\nclass A:\n    b = lambda self: model') == ['f: cfg', 'lambda: model']

@modules
def test_exported_code_has_no_free_names(path): assert free_names(path.read_text('utf8'), path.stem) == []

@modules
def test_public_names_have_a_docstring(path):
    defs = [n for n in ast.parse(path.read_text('utf8')).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_']
    assert not [n.name for n in defs if not ast.get_docstring(n)]

# The notebooks

@notebooks
def test_stored_as_one_fresh_run(path):
    code = [c for c in cells(path, 'code') if source(c).strip() and not NOT_RUN.search(source(c))]
    assert [c['execution_count'] for c in code] == list(range(1, len(code) + 1)), f'run tools/nbrun.py {path.relative_to(ROOT)}'
    assert not [o['ename'] for c in code for o in c['outputs'] if o['output_type'] == 'error']

@notebooks
def test_says_its_kernel_and_no_more(path):
    assert list(json.loads(path.read_text('utf8'))['metadata']) == ['kernelspec'], 'tools/nbrun.py --tidy'

@notebooks
def test_small(path): assert path.stat().st_size <= 400_000

@notebooks
def test_opens_with_a_title_and_a_purpose(path):
    first = source(cells(path, 'markdown')[0])
    assert first.startswith('# ') and re.search(r'^> \S', first, re.M), first

@lessons
def test_lesson_closes_with_summary_exercises_and_next(path):
    if path.stem == 'index': pytest.skip('the tour has its own end')
    text = '\n'.join(source(c) for c in cells(path, 'markdown'))
    assert not [w for w in ('Summary', 'Exercises', 'Next:') if w.lower() not in text.lower()]
    assert path.stem == 'one_page' or (NBS/'solutions'/path.name).exists()

def code_lines(text):
    "Lines that are neither empty nor only a comment"
    return [line for line in text.split('\n') if line.strip() and not line.lstrip().startswith('#')]

def test_one_page_is_short_and_stands_alone():
    code = [source(c) for c in cells(NBS/'one_page.ipynb', 'code')]
    lesson = [text for text in code if '#| hide_input' not in text]
    assert len(code) - len(lesson) == 1, 'one helper cell, for drawing and counting'
    assert sum(len(code_lines(text)) for text in lesson) <= 120
    assert max(len(line) for text in code for line in text.split('\n')) <= 100
    imports = [n for n in ast.walk(ast.parse('\n'.join(code))) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [getattr(n, 'module', None) or n.names[0].name for n in imports]
    assert {name.split('.')[0] for name in names} == {'matplotlib', 'torch'}
    assert not [text for text in code if '#| export' in text]

def test_one_page_names_its_notebooks():
    text = '\n'.join(source(c) for c in cells(NBS/'one_page.ipynb', 'markdown'))
    drawn = re.findall(r'\d\d_[a-z_]+', (NBS/'images'/'one_page.svg').read_text('utf8'))
    linked = re.findall(r'\]\((\w+)\.ipynb\)', text)
    assert len(set(drawn)) >= 10 and not [n for n in {*drawn, *linked} if not (NBS/f'{n}.ipynb').exists()]
    assert not [n for n in set(drawn) if n not in linked]

# The files

def test_no_paths_of_a_machine_and_no_registries(tracked):
    told = re.compile(r'(?<![\w.~])/(work|root|home|tmp)/\w|pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org')
    found = []
    for p in tracked:
        try: text = p.read_text('utf8')
        except UnicodeDecodeError: continue
        found += [f'{p.relative_to(ROOT)}: {text[max(0, m.start()-30):m.end()+30]!r}' for m in told.finditer(text)]
    assert not found, '\n'.join(found)

def test_no_pickles_and_little_data(tracked):
    assert not [p for p in tracked if p.suffix in ('.pt', '.pth', '.pkl', '.pickle', '.ckpt')]
    assert sum(p.stat().st_size for p in tracked if (ROOT/'data') in p.parents) <= 24e6

def test_every_requirement_is_pinned():
    cp = ConfigParser(delimiters=['=']); cp.read(ROOT/'settings.ini')
    norm = lambda s: re.match(r'[\w.-]+', s)[0].lower().replace('_', '-')
    wanted = {norm(r) for k in ('requirements', 'dev_requirements') for r in cp['DEFAULT'][k].split()}
    pins = (ROOT/'constraints.txt').read_text().split('\n')
    assert not wanted - {norm(l) for l in pins if '==' in l}, 'make pins'
    assert not [l for l in pins if '+' in l], 'a local build (such as +cpu) exists on few machines'

def test_version_is_the_same_everywhere():
    cp = ConfigParser(delimiters=['=']); cp.read(ROOT/'settings.ini')
    assert f'__version__ = "{cp["DEFAULT"]["version"]}"' in (LIB/'__init__.py').read_text()

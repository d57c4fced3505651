"What holds for the repository as a whole: the package is what the notebooks export, in the order of their numbers, as they were run."
import ast, base64, builtins, importlib.util, io, json, os, re, shutil, subprocess, symtable, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
LIB, NBS = ROOT/'unclip_nb', ROOT/'nbs'
LESSONS = sorted(NBS.glob('*.ipynb'))
NOTEBOOKS = LESSONS + sorted((NBS/'solutions').glob('*.ipynb'))
MODULES = {p.stem.partition('_')[2]: p.stem.partition('_')[0] for p in LESSONS if p.stem[:2].isdigit()}    # '08' < '08b' < '09'
BY_HAND = ('__init__.py', '__main__.py')                      # the only modules that no notebook exports
EXPORTED = sorted(p for p in LIB.glob('*.py') if p.stem[0] != '_')
NOT_RUN = re.compile(r'^#\|\s*(eval:\s*false|slow)\b', re.M | re.I)
notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
lessons = pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
modules = pytest.mark.parametrize('path', EXPORTED, ids=lambda p: p.stem)


def cells(path, kind):
    return [c for c in json.loads(path.read_text('utf8'))['cells'] if c['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])

@pytest.fixture(scope='module')
def tracked():
    "What git tracks, or would with `git add .`"
    if not (ROOT/'.git').exists():
        pytest.skip('not a git checkout')
    out = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                         cwd=ROOT,
                         capture_output=True,
                         text=True,
                         check=True)
    return sorted({ROOT/f for f in out.stdout.split('\0') if f and (ROOT/f).is_file()})

# The package

def test_package_is_what_the_notebooks_export(tmp_path):
    for f in ('settings.ini', 'pyproject.toml', 'README.md', 'setup.py'):
        shutil.copy(ROOT/f, tmp_path/f)
    shutil.copytree(NBS, tmp_path/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (tmp_path/'unclip_nb').mkdir()
    for f in BY_HAND:
        shutil.copy(LIB/f, tmp_path/'unclip_nb')
    run = subprocess.run(
        [sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'],
        cwd=tmp_path,
        capture_output=True,
        text=True)
    assert run.returncode == 0, run.stderr
    read = lambda folder: {p.name: p.read_text('utf8') for p in folder.glob('*.py')}
    new, old = read(tmp_path/'unclip_nb'), read(LIB)
    assert sorted(new) == sorted(
        old), 'modules without a notebook, or notebooks never exported: make sync'
    assert not [f for f in new if new[f] != old[f]], 'differ from their notebooks: make sync'
    assert (tmp_path/'pyproject.toml').read_text() == (ROOT/'pyproject.toml').read_text()

def test_import_is_quick_and_offers_the_system():
    "`import unclip_nb` loads nothing else; the name that everybody wants is one import away; type checkers may read the annotations."
    code = "import sys, unclip_nb; assert not {'torch', 'unclip_nb.core'} & set(sys.modules); from unclip_nb import UnCLIP; print(UnCLIP.__module__)"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == 'unclip_nb.pipeline\n', run.stderr
    import unclip_nb
    with pytest.raises(AttributeError, match='no attribute .nothing'):
        unclip_nb.nothing
    assert (LIB/'py.typed').exists()

def own_imports(tree):
    "Modules of this package that code imports, wherever the statement stands"
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom):
            if n.level or n.module == 'unclip_nb':
                names = [n.module.split('.')[0]] if n.level and n.module else [
                    a.name for a in n.names if a.name != '__version__'
                ]
                yield from (dict(UnCLIP='pipeline').get(name, name) for name in names)          # `__init__` hands it on
            elif (n.module or '').startswith('unclip_nb.'):
                yield n.module.split('.')[1]
        elif isinstance(n, ast.Import):
            yield from (a.name.split('.')[1] for a in n.names if a.name.startswith('unclip_nb.'))

def test_own_imports_sees_every_form():
    code = (
        'from .a import x\nfrom . import b\nfrom unclip_nb.c import y\nfrom unclip_nb import d\ndef f():\n    import unclip_nb.e as z\nimport torch\n'
        'from unclip_nb import UnCLIP, __version__')
    assert sorted(own_imports(ast.parse(code))) == [*'abcde', 'pipeline']

@modules
def test_module_imports_only_smaller_numbers(path):
    later = [
        m for m in own_imports(ast.parse(path.read_text('utf8')))
        if MODULES[m] >= MODULES[path.stem]
    ]
    assert not later, f'{path.stem} ({MODULES[path.stem]}) imports {later}'

@lessons
def test_lesson_uses_nothing_of_a_later_one(path):
    if path.stem == 'index':
        pytest.skip('the tour uses all of them')
    number = path.stem.partition('_')[0] if path.stem[:2].isdigit() else ''          # one_page stands before all of them
    code = '\n'.join(re.sub(r'^\s*[%!].*$', '', source(c), flags=re.M) for c in cells(path, 'code'))
    assert not [m for m in own_imports(ast.parse(code)) if MODULES[m] > number]

def free_names(code, name='module'):
    "Names that a function or class body reads and neither it, the module nor Python defines"
    top = symtable.symtable(code, name, 'exec')
    known = {
        s.get_name()
        for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()
    } | set(dir(builtins))
    known |= {'__file__', '__name__', '__doc__', '__class__'}
    def walk(table):
        for s in table.get_symbols():
            if s.is_global() and s.is_referenced() and s.get_name() not in known:
                yield f'{table.get_name()}: {s.get_name()}'
        for child in table.get_children():
            yield from walk(child)
    return sorted(set(walk(top)))

def test_free_names_sees_a_free_name():
    assert free_names(
        'import os\ndef f(x): return [os.sep, x, cfg]\nclass A:\n    b = lambda self: model') == [
            'f: cfg', 'lambda: model'
        ]

@modules
def test_exported_code_has_no_free_names(path):
    assert free_names(path.read_text('utf8'), path.stem) == []

@modules
def test_public_names_have_a_docstring(path):
    defs = [
        n for n in ast.parse(path.read_text('utf8')).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_'
    ]
    assert not [n.name for n in defs if not ast.get_docstring(n)]

# The notebooks

@notebooks
def test_stored_as_one_fresh_run(path):
    code = [c for c in cells(path, 'code') if source(c).strip() and not NOT_RUN.search(source(c))]
    assert [c['execution_count'] for c in code
            ] == list(range(1,
                            len(code) + 1)), f'run tools/nbrun.py {path.relative_to(ROOT)}'
    assert not [o['ename'] for c in code for o in c['outputs'] if o['output_type'] == 'error']

@notebooks
def test_says_its_kernel_and_no_more(path):
    "`language_info` is what JupyterLab adds to every notebook that it saves; `tools/nbrun.py --tidy` removes it"
    assert set(json.loads(path.read_text('utf8'))['metadata']) - {'language_info'} == {
        'kernelspec'
    }, 'tools/nbrun.py --tidy'

def as_lab_saves(nb):
    "What JupyterLab writes when a notebook was opened, folded, looked at and saved without its kernel's environment being ours"
    nb['metadata'] = dict(kernelspec=dict(display_name='Python 3 (ipykernel)',
                                          language='python',
                                          name='python3'),
                          language_info=dict(name='python',
                                             version='3.11.7',
                                             file_extension='.py',
                                             mimetype='text/x-python',
                                             codemirror_mode=dict(name='ipython', version=3),
                                             pygments_lexer='ipython3'))
    for c in nb['cells']:
        extra = {'jp-MarkdownHeadingCollapsed': True} if c['cell_type'] == 'markdown' else {
            'scrolled': True, 'execution': {'iopub.status.busy': '2026-11-27'}
        }
        c['metadata'] = c['metadata'] | dict(editable=True, slideshow=dict(slide_type='')) | extra
        for o in c.get('outputs', []):
            for k in o.get('data', {}):
                if k in ('image/png', 'image/jpeg'):
                    o['data'][k] = ''.join(o['data'][k]).rstrip() + '\n'
    return nb

@pytest.mark.parametrize('name', ['00_core', '17_widgets', 'solutions/00_core'])
def test_saved_in_lab_a_notebook_still_passes(name, tmp_path):
    "Also where nobody installed tools/jupyter_server_config.py; `tools/nbrun.py --tidy` then gives the file as it was."
    was, path = NBS/f'{name}.ipynb', tmp_path/f'{Path(name).name}.ipynb'
    path.write_text(
        json.dumps(as_lab_saves(json.loads(was.read_text('utf8'))), indent=1, ensure_ascii=False) +
        '\n', 'utf8')
    assert path.read_bytes() != was.read_bytes()
    for check in (test_stored_as_one_fresh_run, test_says_its_kernel_and_no_more, test_small,
                  test_opens_with_a_title_and_a_purpose):
        check(path)
    tidy = subprocess.run([sys.executable, ROOT / 'tools' / 'nbrun.py', '--tidy', path],
                          cwd=ROOT,
                          capture_output=True,
                          text=True)
    assert tidy.returncode == 0 and path.read_bytes() == was.read_bytes(), tidy.stderr

@pytest.mark.parametrize('name', ['00_core', '17_widgets'])
def test_labs_of_this_environment_save_what_was_there(name, tmp_path):
    "What tools/jupyter_server_config.py does before a save; of notebooks elsewhere it takes nothing"
    from traitlets.config import Config
    hook = Config()
    exec((ROOT/'tools'/'jupyter_server_config.py').read_text('utf8'), dict(c=hook))
    was = json.loads((NBS/f'{name}.ipynb').read_text('utf8'))
    for cell in was['cells']:
        for o in cell.get('outputs', []):
            o.get('data', {}).update({
                k: ''.join(v).rstrip()
                for k, v in o.get('data', {}).items() if k.startswith('image/')
            })
    def saved(path, root):
        model = dict(type='notebook',
                     content=as_lab_saves(json.loads((NBS / f'{name}.ipynb').read_text('utf8'))))
        hook.ContentsManager.pre_save_hook(model=model,
                                           path=path,
                                           contents_manager=type('', (), dict(root_dir=str(root))))
        for cell in model['content']['cells']:
            for o in cell.get('outputs', []):
                o.get('data', {}).update({
                    k: ''.join(v).rstrip()
                    for k, v in o.get('data', {}).items() if k.startswith('image/')
                })
        return model['content']
    assert saved(f'nbs/{name}.ipynb', ROOT) == saved(f'{name}.ipynb', NBS) == was
    assert 'language_info' in saved('other.ipynb', tmp_path)['metadata']

@notebooks
def test_small(path): assert path.stat().st_size <= 400_000

@notebooks
def test_opens_with_a_title_and_a_purpose(path):
    first = source(cells(path, 'markdown')[0])
    assert first.startswith('# ') and re.search(r'^> \S', first, re.M), first

@lessons
def test_lesson_closes_with_summary_exercises_and_next(path):
    if path.stem == 'index':
        pytest.skip('the tour has its own end')
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
    imports = [
        n for n in ast.walk(ast.parse('\n'.join(code)))
        if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    names = [getattr(n, 'module', None) or n.names[0].name for n in imports]
    assert {name.split('.')[0] for name in names} == {'matplotlib', 'torch'}
    assert not [text for text in code if '#| export' in text]

def test_one_page_names_its_notebooks():
    text = '\n'.join(source(c) for c in cells(NBS/'one_page.ipynb', 'markdown'))
    drawn = re.findall(r'\d\d_[a-z_]+', (NBS/'images'/'one_page.svg').read_text('utf8'))
    linked = re.findall(r'\]\((\w+)\.ipynb\)', text)
    assert len(set(
        drawn)) >= 10 and not [n for n in {*drawn, *linked} if not (NBS / f'{n}.ipynb').exists()]
    assert not [n for n in set(drawn) if n not in linked]

# Stored pictures

def drawn(path, pixels, stored=None, colour='red', **metadata):
    "A notebook of one cell that draws `pixels` as a PNG of 64 px, and stores the picture of `stored`."
    code = (
        "from IPython.display import Image as Show\nfrom PIL import Image\nimport io\nout = io.BytesIO()\n"
        "picture = Image.new('RGB', (64, 64), 'navy')\npicture.paste('red', {})\npicture.save(out, 'PNG')\nShow(out.getvalue())"
    )
    from PIL import Image
    picture, out = Image.new('RGB', (64, 64), 'navy'), io.BytesIO()
    picture.paste(colour, stored or pixels)
    picture.save(out, 'PNG')
    output = dict(output_type='execute_result',
                  execution_count=1,
                  metadata={},
                  data={
                      'image/png': base64.b64encode(out.getvalue()).decode(),
                      'text/plain': ['<IPython.core.display.Image object>']
                  })
    cell = dict(cell_type='code',
                id='a',
                execution_count=1,
                metadata=metadata,
                outputs=[output],
                source=code.format(pixels))
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    path.write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)))

def test_a_stored_picture_that_is_another_one_fails(tmp_path):
    "Nbval looks at words and numbers; conftest.py adds the pictures: a square a little further to the side is found, another shade is not."
    drawn(tmp_path/'same.ipynb', (8, 8, 32, 32))
    drawn(tmp_path/'nearly.ipynb', (8, 8, 32, 32), colour='#fa0205')
    drawn(tmp_path/'stale.ipynb', (8, 8, 32, 32), (16, 8, 40, 32))
    drawn(tmp_path/'varies.ipynb', (8, 8, 32, 32), (16, 8, 40, 32), tags=['picture-varies'])
    cmd = [
        sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'conftest', '--nbval',
        '--rootdir', tmp_path, tmp_path
    ]
    run = subprocess.run(cmd,
                         cwd=tmp_path,
                         capture_output=True,
                         text=True,
                         timeout=300,
                         env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert '1 failed, 3 passed' in run.stdout and 'stale.ipynb' in run.stdout and 'is another one than stored' in run.stdout, run.stdout + run.stderr

def test_pictures_are_told_apart_as_a_person_would(monkeypatch):
    "Another quality of JPEG, fewer colours: the same picture. Another size of the figure, another scene: not."
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    import pictures
    from unclip_nb.core import to_pil
    from unclip_nb.shapes import EIGHT_SCENES, render
    def saved(image, kind='PNG', **how):
        out = io.BytesIO()
        image.save(out, kind, **how)
        return base64.b64encode(out.getvalue()).decode()
    a, b = (to_pil(x) for x in render(EIGHT_SCENES[:2], 96))
    assert max(
        pictures.distance(saved(a), saved(x, kind, **how))
        for x, kind, how in ((a, 'JPEG', dict(quality=75, subsampling=0)),
                             (a.quantize(64), 'PNG', {}), (a.convert('RGBA'), 'PNG',
                                                           {}))) < pictures.BOUND
    assert pictures.distance(saved(a), saved(b)) > 5 * pictures.BOUND
    assert pictures.distance(saved(a), saved(a.resize((96, 48)))) == float('inf')

# The files

def test_no_paths_of_a_machine_and_no_registries(tracked):
    told = re.compile(
        r'(?<![\w.~])/(work|root|home|tmp)/\w|pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org'
    )
    found = []
    for p in tracked:
        try:
            text = p.read_text('utf8')
        except UnicodeDecodeError:
            continue
        found += [
            f'{p.relative_to(ROOT)}: {text[max(0, m.start()-30):m.end()+30]!r}'
            for m in told.finditer(text)
        ]
    assert not found, '\n'.join(found)

def test_no_pickles_and_little_data(tracked):
    assert not [p for p in tracked if p.suffix in ('.pt', '.pth', '.pkl', '.pickle', '.ckpt')]
    assert sum(p.stat().st_size for p in tracked if (ROOT/'data') in p.parents) <= 24e6

def test_every_requirement_is_pinned():
    cp = ConfigParser(delimiters=['='])
    cp.read(ROOT/'settings.ini')
    norm = lambda s: re.match(r'[\w.-]+', s)[0].lower().replace('_', '-')
    wanted = {
        norm(r)
        for k in ('requirements', 'dev_requirements')
        for r in cp['DEFAULT'][k].split()
    }
    pins = (ROOT/'constraints.txt').read_text().split('\n')
    assert not wanted - {norm(l) for l in pins if '==' in l}, 'make pins'
    assert not [l for l in pins if '+' in l], 'a local build (such as +cpu) exists on few machines'

def test_version_is_the_same_everywhere():
    cp = ConfigParser(delimiters=['='])
    cp.read(ROOT/'settings.ini')
    assert f'__version__ = "{cp["DEFAULT"]["version"]}"' in (LIB/'__init__.py').read_text()
    assert f'\nversion: {cp["DEFAULT"]["version"]}\n' in (ROOT/'CITATION.cff').read_text()

def test_tables_are_what_their_files_say():
    run = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'tables.py'), '--check'],
        cwd=ROOT,
        capture_output=True,
        text=True)
    assert run.returncode == 0, run.stderr

def test_readme_is_short():
    words = [w for w in (ROOT/'README.md').read_text('utf8').split() if re.search(r'\w', w)]
    assert len(words) <= 700

# The docs site

@pytest.fixture(scope='module')
def mathjax():
    "docs/equations.py, where its MathJax and its node are installed"
    pytest.importorskip('playwright')
    if not importlib.util.find_spec('sphinx-mathjax-offline'):
        pytest.skip('sphinx-mathjax-offline is not installed')
    spec = importlib.util.spec_from_file_location('equations', ROOT/'docs'/'equations.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_equations_of_the_notebooks_render(mathjax):
    found = [(p.stem, tex.strip('$'), tex.startswith('$$')) for p in NOTEBOOKS
             for c in cells(p, 'markdown')
             for tex in re.findall(r'\$\$.+?\$\$|(?<![\\$\w])\$[^$\n]+?\$(?![\w$])',
                                   re.sub(r'`[^`]*`', '', source(c)), re.S)]
    said = mathjax.errors([f[1:] for f in found])
    assert len(found) > 500 and not [(*f[:2], e) for f, e in zip(found, said) if e]

def site(folder, *texts):
    "What sphinx-build says of a site of these markdown cells, and its pages."
    (folder/'nbs').mkdir()
    for name, text in zip(('index', *(f'{k:02}_page' for k in range(len(texts)))),
                          ('# Tour', *texts)):
        cell = dict(cell_type='markdown', id='a', metadata={}, source=text)
        kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
        (folder / 'nbs' / f'{name}.ipynb').write_text(
            json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)), 'utf8')
    cmd = [
        sys.executable, '-m', 'sphinx', '-q', '-b', 'html', '-c', ROOT / 'docs', folder / 'nbs',
        folder / 'html'
    ]
    run = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
    return run, {p.stem: p.read_text('utf8') for p in (folder/'html').glob('*.html')}

def test_docs_fail_on_an_equation_that_readers_see_in_red(mathjax, tmp_path):
    good = '# Good\n\n$$w = \\begin{cases}1 & x\\\\ 2 & y\\end{cases} \\tag{7}$$\n\nand $x^2$'      # \\tag beside \\\\: what Sphinx spoiled in 08
    run, pages = site(tmp_path, good)
    assert run.returncode == 0, run.stderr
    assert '<span class="caption-text">More</span>' in pages['index']                                  # in no part of the book: still in the side bar
    again = tmp_path/'again'
    again.mkdir()
    run, _ = site(again, good, '# Bad\n\n$$\\frac{1}{2$$\n\nand $\\unheardof$')
    assert run.returncode and '2 of 4 equations do not render' in run.stderr, run.stderr
    assert '01_page' in run.stderr and 'unheardof' in run.stderr

def test_every_lesson_has_a_place_in_the_side_bar(mathjax, monkeypatch):
    pytest.importorskip('myst_nb')
    monkeypatch.syspath_prepend(str(ROOT/'docs'))
    import nbdev_docs
    shown = [page for _, pages in nbdev_docs.by_part(NBS) for _, page in pages]
    here = [p for p in (*NOTEBOOKS, NBS/'one_page.ipynb') if p.stem != 'index']
    assert sorted(shown) == sorted({p.relative_to(NBS).as_posix()[:-6] for p in here})

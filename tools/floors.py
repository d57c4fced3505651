"""Do the oldest versions that settings.ini allows work? Resolves them, installs them into an environment of their own (.floors/) and
runs tests/ there, without notebooks and browser: tools/floors.py [--python 3.10] [--newest] [-- options of pytest]

--newest takes the newest versions instead, without the pins of constraints.txt and without what only the notebooks' tools need (fastcore 2,
for one). A build of torch for the GPU is several GB; where a folder of wheels holds a CPU build, UV_FIND_LINKS names it."""
import argparse, os, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ['pytest', 'pytest-xdist', 'beartype', 'scikit-learn', 'diffusers']      # of any version that fits
LEFT_OUT = ['tests/test_repo.py']                                               # needs nbdev; a browser's tests skip themselves
SLOWER = 'tests/test_diffusion.py::test_hybrid_loss_is_one_graph_whatever_the_steps' # torch 2.6 and 2.7 compile this loss in two graphs: same numbers

def required():
    "The package's own requirements, as settings.ini has them."
    cp = ConfigParser(delimiters=['='])
    cp.read(ROOT/'settings.ini', encoding='utf-8')
    return cp['DEFAULT']['requirements'].split()

def build(python, newest, uv):
    "An environment of the oldest (or newest) versions, made where it is missing or outdated; its interpreter and its versions."
    path, ask = shutil.which(python) or python, 'import sys; print(*sys.version_info[:2], sep=".")'
    if os.path.isfile(path):                                                     # an interpreter rather than a version
        python = subprocess.run([path, '-c', ask], check=True, capture_output=True,
                                text=True).stdout.strip()
    home = ROOT/'.floors'/f"{python}-{'newest' if newest else 'oldest'}"
    home.mkdir(parents=True, exist_ok=True)
    wanted, pins, bin = home / 'wanted.txt', home / 'pins.txt', home / 'env' / ('Scripts' if os.name
                                                                                == 'nt' else 'bin')
    own = '\n'.join(required())
    if (home/'ready').exists() and wanted.read_text() == own:
        return bin/'python', pins
    (home/'ready').unlink(missing_ok=True)
    wanted.write_text(own)
    run = lambda *args: subprocess.run([*uv, *map(str, args)], check=True, cwd=home)
    how = 'highest' if newest else 'lowest-direct'                               # what our requirements require stays new
    run('pip', 'compile', '-q', '--python-version', python, '--only-binary', ':all:',
        '--resolution', how, '--no-annotate', '--no-header', wanted, '-o', pins)
    run('venv', '-q', '--clear', '--python', path, home/'env')
    run('pip', 'install', '-q', '--python', bin/'python', '-r', pins, *TESTS)
    (home/'ready').touch()
    return bin/'python', pins

def main():
    here = '.'.join(map(str, sys.version_info[:2]))
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--python', default=here, help='version of Python, or a path to one')
    parser.add_argument('--newest', action='store_true')
    parser.add_argument('rest', nargs='*', help='options of pytest, after --')
    args = parser.parse_args()
    python, pins = build(args.python, args.newest, [sys.executable, '-m', 'uv'])
    names = {r.split('>')[0].replace('_', '-').lower() for r in required()}
    print(*[line for line in pins.read_text().split('\n') if line.split('==')[0] in names],
          sep='\n',
          flush=True)
    tests = args.rest if any(Path(a.split('::')[0]).exists() for a in args.rest) else [
        'tests', *(f'--ignore={t}' for t in LEFT_OUT), f'--deselect={SLOWER}', *args.rest
    ]
    env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    return subprocess.run([python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *tests],
                          cwd=ROOT,
                          env=env).returncode

if __name__ == '__main__':
    sys.exit(main())

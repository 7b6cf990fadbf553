PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads cost a model this small more than they give.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint clean

demo: $(VENV)/.installed  ## install, evaluate the embedded model, print the table
	$(BIN)/zipeval run -m method=vanilla,visionzip tokens=48,32,16
	@echo
	@$(BIN)/zipeval table task=zipeval_shapes
	@echo
	@echo "The records are in results/runs: one folder per run, a JSON file per task and its samples beside it."
	@echo "To type zipeval in this shell: . $(BIN)/activate"

test: $(VENV)/.installed  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

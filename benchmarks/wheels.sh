#!/usr/bin/env bash
# Fills a folder with wheels for benchmarks/gpu.sh, on a machine that has a network: what this package and diffusers
# need beside JAX, torch and transformers, whatever is already there. At most 60 MB.
#   bash benchmarks/wheels.sh                       Python 3.12 on x86-64, into .wheels
#   bash benchmarks/wheels.sh --python 3.13 --machine aarch64 --out DIR [NAME...]
# NAMEs are fetched too, such as matplotlib and scikit-learn, without which the parts of the digits world fail.
# Left out as well are pyarrow and uvloop, which nothing here uses.
set -euo pipefail
cd "$(dirname "$0")/.."
python=3.12 machine=x86_64 out=.wheels more=()
while [ $# -gt 0 ]; do
  case "$1" in
    --python) python="$2" && shift ;;
    --machine) machine="$2" && shift ;;
    --out) out="$2" && shift ;;
    -*) echo "error: unknown flag $1 (see the head of $0)" >&2 && exit 2 ;;
    *) more+=("$1") ;;
  esac
  shift
done

# tests/benchmarking/test_gpu.py compares them with what the requirements require.
names="absl-py aiofiles array-record attrs certifi charset-normalizer chex cloudpickle cycler diffusers dm-tree
docstring-parser einops etils flatbuffers flax googleapis-common-protos grain humanize immutabledict
importlib-metadata importlib-resources joblib lazy-importer ml-collections msgpack narwhals optax orbax-checkpoint
pillow portpicker prometheus-client protobuf psutil pyparsing python-dateutil requests simple-parsing simplejson six tensorboardX
tensorflow-datasets tensorflow-metadata tensorstore termcolor threadpoolctl toml toolz treescope urllib3 wrapt zipp"
only_source="promise" # pure Python, published without a wheel

platforms=()
for name in manylinux_2_{17,24,27,28,31,34}_"$machine" manylinux{1,2010,2014}_"$machine"; do
  platforms+=(--platform "$name")
done
mkdir -p "$out"
rm -f "$out"/*.whl
constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
grep -v '^#\|\[' requirements.txt >"$constraints"
pip=("${PYTHON:-python3}" -m pip --disable-pip-version-check)
# shellcheck disable=SC2086  # words of $names
"${pip[@]}" download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$python" \
  "${platforms[@]}" --constraint "$constraints" --dest "$out" $names "${more[@]}"
"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$out" $only_source

size="$(du -sk --apparent-size "$out" | cut -f1)"
echo "$out: $(find "$out" -name '*.whl' | wc -l) wheels, $((size / 1000)) MB"
if [ "$size" -gt 60000 ]; then
  echo "error: more than 60 MB: name fewer packages" >&2
  exit 1
fi

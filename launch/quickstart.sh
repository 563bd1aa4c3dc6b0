#!/usr/bin/env bash
# From a fresh checkout to pictures on a CPU: trains a small teacher on handwritten digits, distills
# it into a student, and samples and judges the student. Run it again to continue where it stopped.
#   launch/quickstart.sh                 writes runs/quickstart
#   RUNS=elsewhere launch/quickstart.sh  writes elsewhere
#   EXTRAS=cuda launch/quickstart.sh     installs and uses the GPU build of JAX (or EXTRAS=tpu)
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/_env.sh

runs="${RUNS:-runs/quickstart}"
python=.venv/bin/python

stage() {
  printf '\n== %s (%d min %02d s)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60))
}

stage "1/5 environment"
environment "${EXTRAS:-}"

stage "2/5 teacher: flow matching"
$python -m sprint_jax.train --config configs/digits.py:teacher,small --workdir "$runs/teacher"

stage "3/5 student: sCM, trajectories of the teacher, TwinFlow"
$python -m sprint_jax.train --config configs/digits.py:student,small \
  --config.teacher="$runs/teacher" --workdir "$runs/student"

stage "4/5 samples of the student in 1, 2 and 4 steps"
for steps in 1 2 4; do
  $python -m sprint_jax.sample --model "$runs/student" --prompts launch/prompts.txt \
    --steps "$steps" --out "$runs/samples/steps_$steps"
done

stage "5/5 evaluation of student and teacher"
$python -m sprint_jax.evaluate --model "$runs/student" --teacher "$runs/teacher" \
  --metrics digits --count 400 --out "$runs/report.json"

stage "done"
cat <<TXT
pictures  $runs/samples/steps_{1,2,4}/grid.png
curves    $runs/teacher/curves.png
          $runs/student/curves.png
numbers   $runs/report.json
draw      .venv/bin/pip install -e ".[serve]" && $python -m sprint_jax.serve --model $runs/student
TXT

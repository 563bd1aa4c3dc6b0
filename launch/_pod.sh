# shellcheck shell=bash disable=SC2034  # variables are for the scripts that source this
# Sourced by the scripts that start processes:
#   read_flags NAMES WORD...   --NAME VALUE into $NAME (a number if it is one), the words after -- into $words
#   use_backend cpu|cuda|tpu   $extras of the environment, and exported variables for JAX
#   show_or_run WORD...        a command: run, or printed with --dry_run

# shellcheck source=launch/_xla.sh
source "$(dirname "${BASH_SOURCE[0]}")/_xla.sh"

usage_error() {
  echo "error: $* (see the head of $0)" >&2
  exit 2
}

read_flags() {
  local known=" $1 " _name
  dry_run='' words=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [ "$1" = --dry_run ]; then dry_run=1
    elif [[ "$1" == --* && "$known" == *" ${1#--} "* ]]; then
      [ $# -gt 1 ] || usage_error "$1 needs a value"
      _name="${1#--}" # not a name of a flag: it would hide its variable
      [[ ! "${!_name}" =~ ^[0-9]+$ || "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
        usage_error "$1 $2 must be a whole number"
      printf -v "$_name" %s "$2"
      shift
    else
      usage_error "unknown flag $1, known are dry_run$known; the rest comes after --"
    fi
    shift
  done
  [ $# -gt 1 ] || usage_error "nothing comes after --"
  words=("${@:2}")
}

use_backend() {
  local flags=''
  extras="${1#cpu}"
  case " ${words[*]}" in *gs://*) extras="${extras:+$extras,}gcs" ;; *s3://*) extras="${extras:+$extras,}s3" ;; esac
  case "$1" in
    cuda) flags="${gpu_flags[*]}" ;;
    tpu) export LIBTPU_INIT_ARGS="${tpu_flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}" ;;
    cpu) ;;
    *) usage_error "--backend $1 is not one of cpu, cuda, tpu" ;;
  esac
  # Named, so that a missing driver is an error and not a slow run on the CPU.
  export JAX_PLATFORMS="$1" XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
}

show_or_run() {
  if [ -z "$dry_run" ]; then
    "$@"
  else
    printf '%q ' "$@" && echo
  fi
}

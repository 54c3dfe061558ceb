#!/usr/bin/env bash
# A chat job with curl alone: order it once, wait for its result, read its events, resume them.
#
#     bash examples/background_job.sh "Why do cats knead blankets?"
#
# BACKCHANNEL_API_URL says where the API is, BACKCHANNEL_API_KEY who asks; MODEL says who answers,
# by default the offline model that repeats the prompt.
set -euo pipefail

api=${BACKCHANNEL_API_URL:-http://127.0.0.1:8000}
model=${MODEL:-echo}
prompt=${1:-Write a haiku about a queue that moves.}
key="example-$(date +%s)-$$-$RANDOM" # a service takes the id of its own record here

asked() { # no key is needed while there are none
    curl -sS --retry 5 --retry-connrefused --header "x-api-key: ${BACKCHANNEL_API_KEY:-unused}" "$@"
}

quoted() { # a JSON string of one line of text
    printf '"%s"' "$(printf %s "$1" | sed 's/\\/\\\\/g; s/"/\\"/g')"
}

echo "== POST /v1/jobs" >&2
# With the key it may be sent again after a lost connection: it stays one job.
job=$(asked --fail-with-body "$api/v1/jobs" \
    --header 'Content-Type: application/json' \
    --header "Idempotency-Key: $key" \
    --data "{\"model\": $(quoted "$model"), \"prompt\": $(quoted "$prompt")}") || { printf '%s\n' "$job" >&2 && exit 1; }
id=$(printf %s "$job" | sed -n 's/.*"id":"\(job_[0-9a-f]*\)".*/\1/p')
echo "$id" >&2

echo "== GET /v1/jobs/$id?wait=30" >&2
finished='"state":"(succeeded|failed|cancelled|expired)"'
until [[ $job =~ $finished ]]; do # each answer comes as soon as the job has finished
    job=$(asked --fail "$api/v1/jobs/$id?wait=30")
done
printf '%s\n' "$job"
state=${BASH_REMATCH[1]}

echo "== GET /v1/jobs/$id/events" >&2
asked --fail --no-buffer "$api/v1/jobs/$id/events"

# As after a connection that broke behind event 0: what comes is what was missed, to the byte.
echo "== the same with Last-Event-ID: 0" >&2
asked --fail --no-buffer --header 'Last-Event-ID: 0' "$api/v1/jobs/$id/events"

[[ $state == succeeded ]]

#!/usr/bin/env bash
# An operator's queen and hive survive a keeper that is killed in the middle of an answer.
# Arguments: what follows `rbee-keeper infer`. Prints what it sees; exit 0 if all held.
set -u
queen-rbee daemon --port 0 & queen=$!
rbee-hive daemon --port 0 & hive=$!
trap 'kill $queen $hive; wait' EXIT
for _ in $(seq 100); do [ -e "$RBEE_HOME/run/queen.json" ] && [ -e "$RBEE_HOME/run/hive.json" ] && break; sleep 0.1; done

out=$(mktemp)
rbee-keeper infer "$@" --max-tokens 400 > "$out" &
keeper=$!
for _ in $(seq 600); do [ "$(wc -c < "$out")" -gt 20 ] && break; sleep 0.1; done
[ "$(wc -c < "$out")" -gt 20 ] || { echo "no answer came"; exit 1; }
kill -s KILL "$keeper"
wait "$keeper"
rm -f "$out"
sleep 1
kill -0 $queen && kill -0 $hive || { echo "queen or hive did not survive"; exit 1; }

worker=$(rbee-keeper worker list --json)
running=$(python3 - "$worker" "$(cat "$RBEE_HOME/token")" <<'PY'
import json, sys, urllib.request
worker = json.loads(sys.argv[1])[0]
request = urllib.request.Request(worker["url"] + "/metrics")
request.add_header("Authorization", f"Bearer {sys.argv[2]}")
text = urllib.request.urlopen(request).read().decode()
print(next(l.split()[-1] for l in text.splitlines() if l.startswith("rbee_worker_engine_requests")))
PY
) || exit 1
[ "${running%.*}" = 0 ] || { echo "the request was not cancelled: $running running"; exit 1; }

answer=$(rbee-keeper infer "$@" --max-tokens 4) || { echo "the next infer failed"; exit 1; }
[ -n "$answer" ] || { echo "the next infer said nothing"; exit 1; }
after=$(rbee-keeper worker list --json)
[ "$(echo "$worker" | grep -o '"pid": *[0-9]*')" = "$(echo "$after" | grep -o '"pid": *[0-9]*')" ] ||
    { echo "the worker was not reused"; exit 1; }

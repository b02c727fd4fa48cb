#!/usr/bin/env bash
# An operator's queen here and his hive on another machine survive a killed keeper.
# Arguments: ssh_config, host, directory of rbee there, then what follows `rbee-keeper infer`.
# Prints what it sees; exit 0 if all held. The hive runs on: whoever called us ends it.
set -u
config=$1 host=$2 there=$3; shift 3
queen-rbee daemon --port 0 & queen=$!
trap 'kill $queen; wait' EXIT
# As a user would: the session's end must not be the hive's.
ssh -F "$config" "$host" "$there/rbee-hive daemon >/dev/null 2>&1 &"
for _ in $(seq 100); do [ -e "$RBEE_HOME/run/queen.json" ] && break; sleep 0.1; done
for _ in $(seq 100); do ssh -F "$config" "$host" "test -e ~/.rbee/run/hive.json" && break; sleep 0.1; done
hive() { ssh -F "$config" "$host" "grep -o '\"pid\":[0-9]*' ~/.rbee/run/hive.json"; }
before=$(hive) || { echo "no hive on $host"; exit 1; }

out=$(mktemp)
rbee-keeper infer --node "$host" "$@" --max-tokens 400 > "$out" &
keeper=$!
for _ in $(seq 600); do [ "$(wc -c < "$out")" -gt 20 ] && break; sleep 0.1; done
[ "$(wc -c < "$out")" -gt 20 ] || { echo "no answer came"; exit 1; }
kill -s KILL "$keeper"
wait "$keeper"
rm -f "$out"
sleep 1
kill -0 $queen || { echo "the queen did not survive"; exit 1; }
[ "$(hive)" = "$before" ] || { echo "the hive did not survive"; exit 1; }

worker=$(rbee-keeper worker list --json)
answer=$(rbee-keeper infer --node "$host" "$@" --max-tokens 4) || { echo "the next infer failed"; exit 1; }
[ -n "$answer" ] || { echo "the next infer said nothing"; exit 1; }
after=$(rbee-keeper worker list --json)
[ "$(echo "$worker" | grep -o '"pid": *[0-9]*')" = "$(echo "$after" | grep -o '"pid": *[0-9]*')" ] ||
    { echo "the worker was not reused: $worker, then $after"; exit 1; }

#!/usr/bin/env bash
# A long answer, the keeper killed in the middle of it: ten seconds later nothing is left.
# Arguments: what follows `rbee-keeper infer`. Prints what it sees; exit 0 if all held.
set -u
mine() { ps -eo pid=,args= | while read -r pid args; do
    tr '\0' '\n' < "/proc/$pid/environ" 2>/dev/null | grep -qx "RBEE_NONCE=$RBEE_NONCE" &&
        echo "$pid $args"; done; }
count() { mine | awk '{print $2}' | grep -cx -- "$1"; }

out=$(mktemp)
rbee-keeper infer "$@" --max-tokens 400 > "$out" &
keeper=$!
for _ in $(seq 600); do [ "$(wc -c < "$out")" -gt 20 ] && break; sleep 0.1; done

for title in queen-rbee rbee-hive llm-worker-rbee; do
    [ "$(count "$title")" = 1 ] || { echo "mid-stream: $(count "$title") x $title"; mine; exit 1; }
done
kill -s TERM "$keeper"
sleep 10
left=$(mine | grep -v "ephemeral.sh")
rm -f "$out"
wait "$keeper"; code=$?
[ "$code" = 143 ] || { echo "the keeper exited with $code, not 143"; exit 1; }
[ -z "$left" ] || { echo "left after 10 s:"; echo "$left"; exit 1; }

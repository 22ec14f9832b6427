#!/usr/bin/env bash
# Shows an environment that spans three hosts: `make demo-cluster`. The hosts are network namespaces of this computer, each
# with an agent of its own; etcd runs in a fourth, which joins them. It checks what it shows, and exits with 1 when anything
# is not as it should be. Needs root, for the namespaces.
#
#   DIORAMA   the program (default: target/release/diorama)
#
# Everything is kept in temporary folders and namespaces of its own, and is gone at the end, however it ends.

set -euo pipefail

readonly HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly PROGRAM=$(realpath "${DIORAMA:-$HERE/../target/release/diorama}")
readonly HOSTS=(1 2 3)
# How long anything may take to happen, in seconds.
readonly PATIENCE=90

if [ $# -gt 0 ]; then
    echo "cluster.sh: takes no arguments" >&2
    exit 2
fi
if [ "$(id -u)" != 0 ]; then
    echo "cluster.sh: needs root, to make network namespaces; run \`sudo make demo-cluster\`" >&2
    exit 1
fi
for tool in ip etcd; do
    command -v "$tool" >/dev/null || { echo "cluster.sh: $tool is missing; \`make setup\` installs it" >&2; exit 1; }
done
if [ ! -x "$PROGRAM" ]; then
    echo "cluster.sh: there is no $PROGRAM; run \`make demo-cluster\`, which builds it" >&2
    exit 1
fi

# --- Leaving nothing behind ------------------------------------------------------------------------------------------

work=$(mktemp -d "${TMPDIR:-/tmp}/diorama-cluster.XXXXXX")
runtime=$(mktemp -d /dev/shm/diorama-cluster.XXXXXX)
# Namespaces are named for the whole computer.
readonly NAME=dio$$
namespaces=()
clean_up() {
    local status=$? namespace pids
    trap - EXIT
    trap '' INT TERM HUP
    for namespace in "${namespaces[@]}"; do
        pids=$(ip netns pids "$namespace" 2>/dev/null) || continue
        [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
    done
    for namespace in "${namespaces[@]}"; do
        ip netns del "$namespace" 2>/dev/null || true
    done
    rm -rf "$work" "$runtime"
    exit "$status"
}
trap clean_up EXIT
trap 'echo >&2; echo "cluster.sh: interrupted; cleaning up" >&2; exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# --- Saying and asking -----------------------------------------------------------------------------------------------

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
else
    bold= dim= green= red= plain=
fi
step_number=0
step() {
    step_number=$((step_number + 1))
    printf '\n%s%d. %s%s\n' "$bold" "$step_number" "$1" "$plain"
}
say() { printf '   %s\n' "$@"; }
good() { printf '   %s✓%s %s\n' "$green" "$plain" "$1"; }
fail() {
    printf '\n%scluster.sh: %s%s\n' "$red" "$1" "$plain" >&2
    [ ! -s "$work/errors" ] || sed 's/^/    /' "$work/errors" >&2
    exit 1
}
# A command on a host: on NUMBER ARGUMENTS...
on() {
    local host=$1
    shift
    env -u DIORAMA_ENVIRONMENT DIORAMA_HOME="$work/h$host" DIORAMA_RUNTIME_DIR="$runtime/h$host" \
        DIORAMA_STORE="$work/store" ip netns exec "$NAME-h$host" "$PROGRAM" "$@"
}
show() {
    local host=$1
    shift
    printf '   %sh%s$ diorama %s%s\n' "$bold" "$host" "$*" "$plain"
    on "$host" "$@" 2>"$work/errors" | sed 's/^/   /' || fail "\`diorama $*\` on host h$host failed:"
    grep '^warning:' "$work/errors" | sed 's/^/   /' || true
}
quietly() {
    local host=$1
    shift
    on "$host" "$@" 2>"$work/errors" || fail "\`diorama $*\` on host h$host failed:"
}
field() { sed -nE "s/.*\"$1\": ?\"?([^\",}]*)\"?.*/\1/p" <<<"$2" | head -n 1; }
expect() { [ "$3" = "$2" ] || fail "$1: expected $2, found ${3:-nothing}"; }
account() { quietly "$1" -e wide exec "$2" -- cat "/run/$3"; }
wait_beyond() {
    local host=$1 machine=$2 what=$3 name=$4 number=$5 deadline=$((SECONDS + PATIENCE)) now
    while :; do
        account=$(account "$host" "$machine" "$what")
        now=$(field "$name" "$account")
        if [[ $now =~ ^[0-9]+$ ]] && [ "$now" -gt "$number" ]; then
            return
        fi
        [ "$SECONDS" -lt "$deadline" ] || fail "$machine: \"$name\" did not get beyond $number within $PATIENCE s: $account"
        sleep 0.2
    done
}

# --- The demonstration -----------------------------------------------------------------------------------------------

printf '%sDiorama: six machines on three hosts, one snapshot of all, and a host that is lost%s\n' "$bold" "$plain"

step "Three hosts and the network between them"
namespace() {
    ip netns add "$NAME-$1"
    namespaces+=("$NAME-$1")
    ip -n "$NAME-$1" link set lo up
}
namespace net
ip -n "$NAME-net" link add br0 type bridge
ip -n "$NAME-net" addr add 10.77.0.9/24 dev br0
ip -n "$NAME-net" link set br0 up
for host in "${HOSTS[@]}"; do
    namespace "h$host"
    ip link add "up$host" netns "$NAME-h$host" type veth peer name "h$host" netns "$NAME-net"
    ip -n "$NAME-h$host" addr add "10.77.0.$host/24" dev "up$host"
    ip -n "$NAME-h$host" link set "up$host" up
    ip -n "$NAME-net" link set "h$host" master br0 up
done
ip netns exec "$NAME-net" etcd --data-dir "$work/etcd" --listen-client-urls http://10.77.0.9:2379 \
    --advertise-client-urls http://10.77.0.9:2379 --listen-peer-urls http://127.0.0.1:2380 >"$work/etcd.log" 2>&1 &
# The shell is not to report its end.
disown
deadline=$((SECONDS + PATIENCE))
until ip netns exec "$NAME-net" bash -c ': </dev/tcp/10.77.0.9/2379' 2>/dev/null; do
    [ "$SECONDS" -lt "$deadline" ] || { cat "$work/etcd.log" >&2; fail "etcd does not listen"; }
    sleep 0.1
done
show 1 host init --name h1 --address 10.77.0.1:7447 --etcd http://10.77.0.9:2379
token=$(quietly 1 host token --uses 2)
say "${dim}its token lets the others in (TLS between hosts, both sides proven):$plain"
for host in 2 3; do
    printf '   %sh%s$ diorama host join TOKEN --name h%s --address 10.77.0.%s:7447%s\n' "$bold" "$host" "$host" "$host" "$plain"
    quietly "$host" host join "$token" --name "h$host" --address "10.77.0.$host:7447" | sed 's/^/   /'
done
deadline=$((SECONDS + PATIENCE))
until [ "$(quietly 1 host list --json | grep -c '"state": "ready"')" = 3 ]; do
    [ "$SECONDS" -lt "$deadline" ] || fail "not all hosts are there"
    sleep 0.2
done
show 3 host list

step "One environment on all of them"
show 2 up "$HERE/wide.yaml"

step "Traffic between machines on different hosts: a TCP session and a numbered UDP stream"
quietly 1 -e wide exec --wait "$PATIENCE" f -- sh -c 'traffic tcp-serve --port 7000 --status /run/tcp >/dev/null 2>&1 &' >/dev/null
quietly 1 -e wide exec --wait "$PATIENCE" b -- sh -c 'traffic udp-recv --port 7001 --status /run/udp >/dev/null 2>&1 &' >/dev/null
quietly 1 -e wide exec f -- sh -c 'until [ -s /run/tcp ]; do sleep 0.1; done'
quietly 1 -e wide exec b -- sh -c 'until [ -s /run/udp ]; do sleep 0.1; done'
quietly 2 -e wide exec --wait "$PATIENCE" a -- \
    sh -c 'traffic tcp-send --to 10.0.0.6:7000 --rate 256KiB --status /run/tcp >/dev/null 2>&1 &' >/dev/null
quietly 3 -e wide exec --wait "$PATIENCE" c -- \
    sh -c 'traffic udp-send --to 10.0.0.2:7001 --rate 100 --status /run/udp >/dev/null 2>&1 &' >/dev/null
wait_beyond 2 f tcp bytes 500000
connection=$(field connection "$account")
bytes_before=$(field bytes "$account")
wait_beyond 3 b udp highest 100
lost_before=$(field lost "$account")
good "TCP session $connection from a to f: $bytes_before bytes checked; UDP from c to b: $lost_before lost"

step "A snapshot of all six at one cut, while they work"
show 3 snapshot create -e wide live
report=$(quietly 1 snapshot show -e wide live --json)
expect "frames that the snapshot does not account for" 0 "$(sed -nE 's/^ *"unaccounted": (-?[0-9]+),?$/\1/p' <<<"$report" | sort -u)"
say "$(sed -nE 's/^ *"(skew_us|hosts|in_flight|sent_before|wire_loss)": ([0-9]+),?$/\1 \2/p' <<<"$report" | head -n 5 | paste -sd, | sed 's/,/, /g')"
wait_beyond 1 f tcp bytes "$bytes_before"
expect "the TCP session" "$connection" "$(field connection "$account")"
expect "wrong bytes in the TCP stream" 0 "$(field bad_bytes "$account")"
wait_beyond 1 b udp highest "$(field highest "$(account 1 b udp)")"
expect "datagrams that came twice" 0 "$(field duplicated "$account")"
good "every frame is accounted for, on every host; the traffic went on"
show 2 snapshot verify -e wide live

step "Host h2 loses its power"
pids=$(ip netns pids "$NAME-h2")
kill -KILL $pids
say "${dim}killed: an agent and its machines ...$plain"
deadline=$((SECONDS + PATIENCE))
until quietly 1 host list --json | grep -q '"state": "lost"'; do
    [ "$SECONDS" -lt "$deadline" ] || fail "host h2 is not found to be lost"
    sleep 0.5
done
show 1 status -e wide

step "The whole environment, from the snapshot, on the two hosts that are left"
show 3 restore -e wide live
show 1 status -e wide
expect "machines that run" 6 "$(quietly 1 status -e wide --json | grep -c '"state": "running"')"
wait_beyond 1 f tcp bytes "$bytes_before"
expect "the TCP session" "$connection" "$(field connection "$account")"
wait_beyond 3 f tcp bytes "$(field bytes "$account")"
expect "wrong bytes in the TCP stream" 0 "$(field bad_bytes "$account")"
good "the same TCP session $connection goes on, between machines that have moved; no byte wrong"

step "Clean up"
show 1 down --all --volumes
show 3 snapshot rm -e wide live
for host in 1 3; do quietly "$host" agent stop >/dev/null; done
# The folders themselves are gone as well; but for those of the host whose power went.
left=$(find "$runtime" -mindepth 1 -not -path "$runtime/h2*" -print -quit)
expect "files left in $runtime" "" "$left"

printf '\n%s✓ Six machines on three hosts were snapshotted at one cut, one host was lost,\n' "$green$bold"
printf '  and all came back on the other two with their TCP session, in %d s.%s\n' "$SECONDS" "$plain"

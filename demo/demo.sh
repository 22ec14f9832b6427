#!/usr/bin/env bash
# Shows what Diorama does, with real machines: `make demo`. It checks what it shows, and exits with 1 when anything is
# not as it should be.
#
#   DIORAMA   the program (default: target/release/diorama)
#
# Everything is kept in two temporary folders of its own, and is gone at the end, however it ends.

set -euo pipefail

readonly HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly PROGRAM=${DIORAMA:-$HERE/../target/release/diorama}
readonly FORKS=4
# What the traffic does in a second: enough to have frames in flight at any time, and little enough for fifteen
# machines without KVM on two cores.
readonly TCP_RATE=512KiB
readonly UDP_RATE=200
# How long anything may take to happen, in seconds. Nothing here waits for a time to pass.
readonly PATIENCE=90

if [ $# -gt 0 ]; then
    echo "demo.sh: takes no arguments" >&2
    exit 2
fi
if [ ! -x "$PROGRAM" ]; then
    echo "demo.sh: there is no $PROGRAM; run \`make demo\`, which builds it" >&2
    exit 1
fi

# --- Leaving nothing behind ------------------------------------------------------------------------------------------

work=
runtime=
clean_up() {
    local status=$?
    trap - EXIT
    trap '' INT TERM HUP
    if [ -n "$runtime" ] && { [ -S "$runtime/agent.sock" ] || [ -d "$runtime/e" ]; }; then
        put_away >"$work/clean-up" 2>&1 || { echo "demo.sh: could not clean up:" >&2; cat "$work/clean-up" >&2; }
    fi
    [ -z "$work" ] || rm -rf "$work"
    [ -z "$runtime" ] || rm -rf "$runtime"
    exit "$status"
}
# What was interrupted may still be being undone by the agent.
put_away() {
    local deadline=$((SECONDS + PATIENCE))
    until "$PROGRAM" down --all --volumes; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.5
    done
    "$PROGRAM" agent stop
}
trap clean_up EXIT
trap 'echo >&2; echo "demo.sh: interrupted; cleaning up" >&2; exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

work=$(mktemp -d "${TMPDIR:-/tmp}/diorama-demo.XXXXXX")
runtime=$(mktemp -d /dev/shm/diorama-demo.XXXXXX)
export DIORAMA_HOME=$work/home
export DIORAMA_RUNTIME_DIR=$runtime
unset DIORAMA_ENVIRONMENT

# --- Saying things ---------------------------------------------------------------------------------------------------

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
    if grep -qs '^error: interrupted' "$work/errors"; then
        exit 130
    fi
    printf '\n%sdemo.sh: %s%s\n' "$red" "$1" "$plain" >&2
    if [ -s "$work/errors" ]; then
        sed 's/^/    /' "$work/errors" >&2
    fi
    exit 1
}
# Runs a command of Diorama's, and shows it as one would type it. The steps that it reports on standard error are of
# interest only when it fails; its warnings are always.
show() {
    printf '   %s$ diorama%s%s\n' "$bold" "$(quoted "$@")" "$plain"
    "$PROGRAM" "$@" 2>"$work/errors" | sed 's/^/   /' || fail "\`diorama$(quoted "$@")\` failed:"
    grep '^warning:' "$work/errors" | sed 's/^/   /' || true
}
# The same, not shown.
quietly() { "$PROGRAM" "$@" 2>"$work/errors" || fail "\`diorama$(quoted "$@")\` failed:"; }
quoted() {
    local word
    for word in "$@"; do
        case $word in
        *[!A-Za-z0-9_./=:+-]*) printf " '%s'" "$word" ;;
        *) printf ' %s' "$word" ;;
        esac
    done
}
# 1234567 as 1,234,567.
grouped() { sed -E ':a; s/^([0-9]+)([0-9]{3})/\1,\2/; ta' <<<"$1"; }

# --- Asking ----------------------------------------------------------------------------------------------------------

# The value of a field in JSON that has each field once, or of the first field of that name.
field() { sed -nE "s/.*\"$1\": ?\"?([^\",}]*)\"?.*/\1/p" <<<"$2" | head -n 1; }
# All values of a field, one a line, of JSON with a field a line.
fields() { sed -nE "s/^ *\"$1\": \"?([^\",]*)\"?,?\$/\1/p" <<<"$2"; }
# What `traffic` says of itself in a machine of an environment.
account() { quietly -e "$1" exec "$2" -- cat "/run/$3"; }
# Waits until a number in a machine's account is more than it was, and leaves the account in `account`.
wait_beyond() {
    local environment=$1 machine=$2 what=$3 name=$4 number=$5 deadline=$((SECONDS + PATIENCE)) now
    while :; do
        account=$(account "$environment" "$machine" "$what")
        now=$(field "$name" "$account")
        if [[ $now =~ ^[0-9]+$ ]] && [ "$now" -gt "$number" ]; then
            return
        fi
        [ "$SECONDS" -lt "$deadline" ] ||
            fail "$environment/$machine: \"$name\" did not get beyond $number within $PATIENCE s: $account"
        sleep 0.2
    done
}
expect() {
    local what=$1 wanted=$2 found=$3
    [ "$found" = "$wanted" ] || fail "$what: expected $wanted, found ${found:-nothing}"
}
# What must be true of the traffic after a cut: the same session, going on, no byte wrong, no datagram lost.
# Leaves `tcp` and `udp`.
check_traffic() {
    local environment=$1
    wait_beyond "$environment" server tcp bytes "$bytes_before"
    tcp=$account
    wait_beyond "$environment" server tcp bytes "$(field bytes "$tcp")"
    tcp_later=$account
    wait_beyond "$environment" observer udp highest "$highest_before"
    udp=$account
    wait_beyond "$environment" observer udp highest "$(field highest "$udp")"
    udp=$account
    expect "$environment: the TCP session's state" open "$(field state "$tcp_later")"
    expect "$environment: the TCP session" "$connection" "$(field connection "$tcp_later")"
    expect "$environment: how many sessions there were" 1 "$(field connections "$tcp_later")"
    expect "$environment: wrong bytes in the TCP stream" 0 "$(field bad_bytes "$tcp_later")"
    expect "$environment: the UDP stream" "$sender" "$(field sender "$udp")"
    expect "$environment: lost datagrams" "$lost_before" "$(field lost "$udp")"
    expect "$environment: datagrams that came twice" 0 "$(field duplicated "$udp")"
}

# --- The demonstration -----------------------------------------------------------------------------------------------

printf '%sDiorama: three machines, their traffic, and a snapshot of all of it while it runs%s\n' "$bold" "$plain"
quietly --version >"$work/version"
say "${dim}$(cat "$work/version"); everything is kept in $work and $runtime, and removed at the end$plain"
readonly HOST_CPUS=$(nproc)

step "Start an environment: one file, three machines, one network"
cp "$HERE/lab.yaml" "$work/lab.yaml"
cd "$work"
say "${dim}lab.yaml:$plain"
sed 's/^/     /' lab.yaml
show up lab.yaml

step "Let it work: a TCP session and a numbered UDP stream"
say "${dim}Waiting for the guests to boot (they do so at the pace of this computer) ...$plain"
run() { show exec --wait "$PATIENCE" "$1" -- sh -c "$2 >/dev/null 2>&1 &"; }
run server "traffic tcp-serve --port 7000 --status /run/tcp"
run observer "traffic udp-recv --port 7001 --status /run/udp"
quietly exec --wait "$PATIENCE" server -- sh -c 'until [ -s /run/tcp ]; do sleep 0.1; done'
quietly exec --wait "$PATIENCE" observer -- sh -c 'until [ -s /run/udp ]; do sleep 0.1; done'
run client "traffic tcp-send --to 10.0.0.1:7000 --rate $TCP_RATE --status /run/tcp"
run server "traffic udp-send --to 10.0.0.3:7001 --rate $UDP_RATE --status /run/udp"
wait_beyond lab server tcp bytes 1000000
tcp=$account
wait_beyond lab observer udp highest 400
udp=$account
connection=$(field connection "$tcp")
bytes_before=$(field bytes "$tcp")
sender=$(field sender "$udp")
highest_before=$(field highest "$udp")
lost_before=$(field lost "$udp")
retransmits_before=$(field retransmits "$(account lab client tcp)")
good "TCP session $connection: $(grouped "$bytes_before") bytes checked by the server"
good "UDP stream $sender: $(grouped "$highest_before") datagrams at the observer, $lost_before lost"

step "Snapshot all of it while it runs"
show snapshot create live -m 'in the middle of everything'
say "${dim}What it cost, machine by machine, and where every frame was:$plain"
show snapshot show live
report=$(quietly snapshot show live --json)
in_flight=$(field in_flight "$(sed -n '/^  "frames"/,/^  }/p' <<<"$report")")
unaccounted=$(fields unaccounted "$report" | sort -u)
skew_us=$(field skew_us "$report")
pause_us=$(fields pause_us "$report" | sort -n | tail -n 1)
expect "frames that the snapshot does not account for" 0 "$unaccounted"
expect "machines in the snapshot" 3 "$(fields pause_us "$report" | wc -l)"
good "every frame is accounted for; in flight between machines, and so in the snapshot: $in_flight"
check_traffic lab
good "and the traffic went on: $(grouped "$(field bytes "$tcp_later")") bytes, no datagram lost"
bytes_at_end=$(field bytes "$tcp_later")

step "Destroy the environment"
show down --volumes
show status
environments=$(quietly status --json)
expect "environments that are left" "" "$(fields pid "$environments")"

step "Restore it, and find the same TCP session going on"
show restore live
check_traffic lab
bytes_after=$(field bytes "$tcp")
if [ "$bytes_after" -lt "$bytes_at_end" ]; then
    say "When it was destroyed, the server had checked $(grouped "$bytes_at_end") bytes of session $connection."
    say "Now it is back at the snapshot: $(grouped "$bytes_after"), and a moment later $(grouped "$(field bytes "$tcp_later")")."
fi
retransmits=$(field retransmits "$(account lab client tcp)")
good "the same TCP session $connection, no byte wrong, segments sent again: $((retransmits - retransmits_before))"
good "the same UDP stream $sender, datagram $(grouped "$(field highest "$udp")"), none lost"

step "Fork it: $FORKS more, side by side"
show fork live --count "$FORKS"
say ""
say "$(printf '%-11s %-16s  %12s    %12s  %5s  %8s  %s' ENVIRONMENT 'TCP SESSION' BYTES LATER WRONG UDP\ LOST 'MEMORY (PSS) OF ITS MACHINES')"
private_total=0
private_count=0
for number in $(seq "$FORKS"); do
    fork=lab-fork-$number
    check_traffic "$fork"
    memory=
    for pid in $(fields pid "$(quietly status -e "$fork" --json)"); do
        [ -r "/proc/$pid/smaps_rollup" ] || fail "$fork: QEMU's process $pid is not there"
        kib=$(sed -nE 's/^Pss: +([0-9]+) kB/\1/p' "/proc/$pid/smaps_rollup")
        memory="$memory${memory:+, }$((kib / 1024)) MiB"
        private_total=$((private_total + kib))
        private_count=$((private_count + 1))
    done
    expect "$fork: machines" 3 "$(tr ',' '\n' <<<"$memory" | wc -l)"
    say "$(printf '%-11s %-16s  %12s -> %12s  %5s  %8s  %s' "$fork" "$(field connection "$tcp_later")" \
        "$(grouped "$(field bytes "$tcp")")" "$(grouped "$(field bytes "$tcp_later")")" \
        "$(field bad_bytes "$tcp_later")" "$(field lost "$udp")" "$memory")"
done
good "$((FORKS + 1)) environments of three machines with the same addresses run side by side on $HOST_CPUS processors"
good "a forked machine of 256 MiB takes $((private_total / private_count / 1024)) MiB (PSS: its own pages, and its share of shared ones)"

step "Prove the snapshot: every byte's hash, every frame"
show snapshot list
show snapshot verify live

step "Clean up"
show down --all --volumes
show snapshot rm live
show agent stop
left=$([ ! -d "$runtime" ] || find "$runtime" -mindepth 1 | head -n 3)
expect "files left in $runtime" "" "$left"

milliseconds() { printf '%d.%d ms' "$(($1 / 1000))" "$(($1 % 1000 / 100))"; }
printf '\n%s✓ A live TCP session and a UDP stream were snapshotted (pause %s, skew %s, %s in flight, 0 unaccounted),\n' \
    "$green$bold" "$(milliseconds "$pause_us")" "$(milliseconds "$skew_us")" "$in_flight"
printf '  destroyed, restored and forked %s times, without a lost datagram or a wrong byte, in %d s.%s\n' \
    "$FORKS" "$SECONDS" "$plain"

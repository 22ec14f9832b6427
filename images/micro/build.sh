#!/usr/bin/env bash
# Builds the built-in guest image `micro`: Debian's cloud kernel and an initrd with
# busybox, iperf3, the QEMU guest agent and diorama's traffic generator.
#
#   images/micro/build.sh OUT [--traffic PROGRAM] [--cache FOLDER]
#
# writes OUT/micro/{kernel,initrd,image.json}. It needs no root: packages are fetched
# with apt-get and unpacked in a folder, never installed. The same packages, sources and
# program give the same bytes. A stamp of all of them makes the second call quick.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    printf 'images/micro/build.sh: %s\n' "$*" >&2
    exit 1
}

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

out=
traffic=
cache=$here/../../target/images/cache
while [ $# -gt 0 ]; do
    case $1 in
    --traffic) traffic=${2:?--traffic needs a program}; shift 2 ;;
    --cache) cache=${2:?--cache needs a folder}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "unknown option $1 (--help tells more)" ;;
    *) [ -z "$out" ] || fail "one output folder only, got also $1"; out=$1; shift ;;
    esac
done
[ -n "$out" ] || fail "no output folder given (--help tells more)"
[ -z "$traffic" ] || [ -x "$traffic" ] || fail "$traffic: no such program"

for tool in apt-get apt-cache dpkg-deb readelf strip cpio find sort sha256sum touch; do
    command -v "$tool" >/dev/null || fail "$tool is missing (make setup installs what is needed)"
done

# Kernel modules by file name; what they depend on comes along. ext4 and packet sockets
# are built into this kernel. vmgenid is taken where the kernel has it.
modules=(virtio_pci virtio_net virtio_blk virtio_console virtio-rng button evdev)
optional_modules=(vmgenid)

# Boot is fastest with as little asked of the guest as possible; a panic reboots, so that
# a broken machine is seen to come back rather than to hang. `nokaslr` and
# `mitigations=off` because a TCG guest has nothing to gain from them.
cmdline="console=ttyS0 quiet panic=10 nokaslr mitigations=off no_timer_check tsc=reliable cryptomgr.notests 8250.nr_uarts=1 random.trust_cpu=on"

# --- packages ---------------------------------------------------------------------------

# depends PACKAGE...: the first alternative of each of their dependencies. One call for
# many packages: where apt keeps no cache file, each call builds it anew.
depends() {
    apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks \
        --no-replaces --no-enhances "$@" 2>/dev/null |
        sed -nE 's/^  (Pre)?Depends: ([^<][^ ]*)$/\2/p'
}

# The packages to unpack, as NAME=VERSION with the version that apt would install, if it can still be fetched.
packages=()
choose_packages() {
    local kernel dependency
    local -A chosen=()
    kernel=$(depends linux-image-cloud-amd64 | grep -m1 '^linux-image-') || return 1
    chosen=([$kernel]=1 [busybox-static]=1 [iperf3]=1 [qemu-guest-agent]=1)
    local level=(iperf3 qemu-guest-agent) next
    while [ ${#level[@]} -gt 0 ]; do
        next=()
        # Only libraries are wanted of what a package depends on: nothing of it is ever
        # configured, so debconf, adduser and their kind have no business here.
        while read -r dependency; do
            dependency=${dependency%%:*}
            case $dependency in lib* | zlib*) ;; *) continue ;; esac
            [ -z "${chosen[$dependency]:-}" ] || continue
            chosen[$dependency]=1
            next+=("$dependency")
        done < <(depends "${level[@]}")
        level=("${next[@]}")
    done
    # The candidate may be a version that is installed and that no source has any more (a later update took its
    # place, or the lists are older than the system): then the highest that a source has.
    mapfile -t packages < <(
        {
            apt-cache policy "${!chosen[@]}" 2>/dev/null |
                sed -nE 's/^([^ ]+):$/\1/;t name;s/^  Candidate: //;T;H;x;s/\n/ /p;d;:name;h'
            apt-cache madison "${!chosen[@]}" 2>/dev/null | tr -d '|'
        } | awk '
            NF == 2 { candidate[$1] = $2; next }
            !($1 in highest) { highest[$1] = $2 }
            candidate[$1] == $2 { there[$1] = 1 }
            END { for (name in highest) print name "=" (name in there ? candidate[name] : highest[name]) }
        ' | LC_ALL=C sort
    )
    [ ${#packages[@]} -eq ${#chosen[@]} ]
}

sources_digest() {
    (
        cd "$here"
        find build.sh root -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
        [ -z "$traffic" ] || sha256sum <"$traffic"
    ) | sha256sum | cut -d' ' -f1
}

[ -z "$traffic" ] || traffic=$(realpath "$traffic")
mkdir -p "$out" "$cache"
out=$(realpath "$out")/micro
cache=$(realpath "$cache")
stamp=$out/.stamp

# apt's own lists decide whether the package choice can have changed.
lists_digest() {
    stat -c '%n %Y' /var/lib/apt/lists/*_Packages* 2>/dev/null | sha256sum | cut -d' ' -f1
}

sources=$(sources_digest)
quick="sources $sources lists $(lists_digest)"
if [ -f "$stamp" ] && [ "$(head -n1 "$stamp")" = "$quick" ]; then
    echo "micro: up to date"
    exit 0
fi

if ! choose_packages; then
    if [ -f "$out/image.json" ] && grep -q "^sources $sources " "$stamp" 2>/dev/null; then
        echo "micro: apt knows no candidate for the packages; keeping the image as it is" >&2
        exit 0
    fi
    fail "apt knows no linux-image-cloud-amd64, busybox-static, iperf3 or qemu-guest-agent: its lists are missing or old. Run 'apt-get update' as root, or 'make setup'"
fi

if [ -f "$stamp" ] && grep -q "^sources $sources " "$stamp" &&
    [ "$(tail -n+2 "$stamp")" = "$(printf '%s\n' "${packages[@]}")" ]; then
    { echo "$quick"; printf '%s\n' "${packages[@]}"; } >"$stamp.new"
    mv "$stamp.new" "$stamp"
    echo "micro: up to date"
    exit 0
fi

# deb_file PACKAGE=VERSION: its file in the cache, whatever architecture (amd64 or all).
deb_file() {
    local name=${1%%=*} file_version=${1#*=}
    find "$cache" -maxdepth 1 -name "${name}_${file_version//:/%3a}_*.deb" -print -quit
}

missing=()
for package in "${packages[@]}"; do
    [ -n "$(deb_file "$package")" ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "micro: fetching ${#missing[@]} packages" >&2
    apt_options=(-qq)
    # Root's apt would fetch as a user who may not write to our cache.
    [ "$(id -u)" != 0 ] || apt_options+=(-o APT::Sandbox::User=root)
    (cd "$cache" && apt-get "${apt_options[@]}" download "${missing[@]}") ||
        fail "apt-get download failed. If its lists are old, 'apt-get update' as root mends it"
fi

# --- staging ----------------------------------------------------------------------------

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
debs=$work/debs
stage=$work/stage
mkdir -p "$debs" "$stage"

for package in "${packages[@]}"; do
    file=$(deb_file "$package")
    [ -n "$file" ] || fail "$package was fetched but is not in $cache"
    dpkg-deb -x "$file" "$debs"
done

mkdir -p "$stage"/{bin,sbin,usr/bin,usr/sbin,etc,dev,proc,sys,tmp,run,root,mnt,var,lib64,lib/x86_64-linux-gnu}
ln -s ../run "$stage/var/run"
ln -s ../tmp "$stage/var/tmp"
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$stage/etc/passwd"
printf 'root:x:0:\ntty:x:5:\n' >"$stage/etc/group"
printf 'hosts: files\n' >"$stage/etc/nsswitch.conf"
cp -r "$here/root/." "$stage"

for name in poweroff reboot halt; do
    ln -s shutdown "$stage/sbin/$name"
done

cp "$debs"/bin/busybox "$stage/bin/busybox"
while read -r applet; do
    case $applet in
    */busybox | linuxrc) continue ;;
    esac
    [ -e "$stage/$applet" ] || ln -s /bin/busybox "$stage/$applet"
done < <("$debs/bin/busybox" --list-full)

programs=("$debs/usr/bin/iperf3" "$debs/usr/sbin/qemu-ga")
if [ -n "$traffic" ]; then
    # Ours, so we may: its line tables are most of it.
    strip -o "$work/traffic" "$traffic"
    programs+=("$work/traffic")
fi
for program in "${programs[@]}"; do
    install -m 755 "$program" "$stage/usr/bin/${program##*/}"
done

# needed FILE: the sonames in its dynamic section.
needed() {
    readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'
}

# The closure of the sonames, each looked up in the unpacked packages alone: what this
# computer happens to have installed must not leak in.
queue=("${programs[@]}")
while [ ${#queue[@]} -gt 0 ]; do
    object=${queue[0]}
    queue=("${queue[@]:1}")
    while read -r soname; do
        case $soname in ld-linux-x86-64.so.2) continue ;; esac
        [ ! -e "$stage/lib/x86_64-linux-gnu/$soname" ] || continue
        found=
        for folder in "$debs"/{,usr/}lib/x86_64-linux-gnu; do
            if [ -e "$folder/$soname" ]; then
                found=$folder/$soname
                break
            fi
        done
        [ -n "$found" ] || fail "$soname, needed by ${object##*/}, is in none of the packages"
        install -m 755 "$(realpath "$found")" "$stage/lib/x86_64-linux-gnu/$soname"
        queue+=("$found")
    done < <(needed "$object")
done
# The loader's link may point at an absolute path, which means this host's: resolve by hand.
for loader in "$debs"/{,usr/}lib/x86_64-linux-gnu/ld-linux-x86-64.so.2; do
    [ ! -f "$loader" ] || install -m 755 "$loader" "$stage/lib64/ld-linux-x86-64.so.2"
done
[ -f "$stage/lib64/ld-linux-x86-64.so.2" ] || fail "libc6 holds no ld-linux-x86-64.so.2"

# Debian 13 and later keep modules under /usr.
modules_root=
for folder in "$debs"/{,usr/}lib/modules/*; do
    [ ! -d "$folder/kernel" ] || modules_root=$folder
done
[ -n "$modules_root" ] || fail "the kernel package holds no modules"
release=${modules_root##*/}
target=lib/modules/$release

# module_file NAME: a module's path, whichever of - and _ the file name has.
module_file() {
    find "$modules_root/kernel" \( -name "${1//_/-}.ko*" -o -name "${1//-/_}.ko*" \) -print -quit
}

copy_module() {
    local file name dependency
    file=$(module_file "$1")
    [ -n "$file" ] || return 1
    name=$target/kernel/${file#"$modules_root/kernel/"}
    case $file in
    *.ko) ;;
    *.ko.xz) name=${name%.xz} ;;
    *) fail "${file##*/}: unknown module compression" ;;
    esac
    [ ! -e "$stage/$name" ] || return 0
    mkdir -p "$stage/${name%/*}"
    case $file in
    *.ko) cp "$file" "$stage/$name" ;;
    *.ko.xz) xz -dc "$file" >"$stage/$name" ;;
    esac
    # `modinfo` is kmod's, which a container may lack: the section is plain text.
    while read -r dependency; do
        [ -z "$dependency" ] || copy_module "$dependency" ||
            fail "module $dependency, needed by $1, is not in the kernel package"
    done < <(tr '\0' '\n' <"$stage/$name" | grep -a '^depends=' | sed 's/^depends=//' | tr ',' '\n')
}

is_builtin() {
    grep -qE "/(${1//_/-}|${1//-/_})\.ko$" "$modules_root/modules.builtin"
}

for module in "${modules[@]}"; do
    is_builtin "$module" || copy_module "$module" || fail "module $module is not in the kernel package"
done
for module in "${optional_modules[@]}"; do
    is_builtin "$module" || copy_module "$module" || true
done
cp "$modules_root/modules.builtin" "$stage/$target/"
# busybox's own format, for busybox's own modprobe.
"$debs/bin/busybox" depmod -b "$stage" "$release" 2>/dev/null
[ -s "$stage/$target/modules.dep" ] || fail "depmod wrote no modules.dep"
rm -f "$stage/$target"/modules.{alias,symbols}

# --- output -----------------------------------------------------------------------------

find "$stage" -print0 | xargs -0 touch --no-dereference --date=@0
chmod -R u=rwX,go=rX "$stage"
chmod 755 "$stage"

mkdir -p "$out"
# Not compressed: under TCG, unpacking costs more than reading.
(
    cd "$stage"
    find . -mindepth 1 -print0 | LC_ALL=C sort -z |
        cpio --null --create --format=newc --reproducible --owner=0:0 --quiet
) >"$work/initrd"

rm -f "$stamp"
install -m 644 "$debs/boot/vmlinuz-$release" "$out/kernel"
install -m 644 "$work/initrd" "$out/initrd"
printf '{"name":"micro","kernel":"kernel","initrd":"initrd","cmdline":"%s"}\n' "$cmdline" >"$out/image.json"
{ echo "$quick"; printf '%s\n' "${packages[@]}"; } >"$stamp"
echo "micro: kernel $release, initrd $(stat -c %s "$out/initrd") bytes, in $out"

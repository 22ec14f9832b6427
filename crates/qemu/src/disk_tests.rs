//! Overlays against `qemu-img` and `qemu-io`; damaged headers.

use super::*;
use proptest::prelude::*;
use std::fs;
use std::process::Command;

/// Runs a QEMU tool, requires success, and returns its output.
fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("the tool is installed");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn an_overlay_is_valid_for_qemu() {
    let folder = tempfile::tempdir().expect("folder");
    let cases = [
        (1 << 20, 16),
        (512, 16),
        (10 << 30, 16),
        (3 << 40, 16),
        ((1 << 30) + 512, 12),
        (64 << 30, 21),
        (7 << 20, 14),
    ];
    for (size, cluster_bits) in cases {
        let path = folder.path().join(format!("{size}-{cluster_bits}"));
        create_overlay(&path, size, cluster_bits).expect("create");
        let check = tool("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        assert!(check.contains("No errors were found"), "{check}");
        let info: serde_json::Value =
            serde_json::from_str(&tool("qemu-img", &["info", "--output=json", text(&path)])).expect("json");
        assert_eq!(info["format"], "qcow2");
        assert_eq!(info["virtual-size"], size);
        assert_eq!(info["cluster-size"], 1u64 << cluster_bits);
        assert!(info.get("backing-filename").is_none());
        let expected = Probe { format: DiskFormat::Qcow2, virtual_size_bytes: size, has_backing: false };
        assert_eq!(probe(&path).expect("probe"), expected);
    }
}

#[test]
fn an_overlay_can_be_written_and_stays_valid() {
    let folder = tempfile::tempdir().expect("folder");
    let base = folder.path().join("base");
    fs::write(&base, vec![0x11; 8 << 20]).expect("base");
    let overlay = folder.path().join("overlay");
    create_overlay(&overlay, 8 << 20, DEFAULT_CLUSTER_BITS).expect("create");
    let image = format!(
        "json:{{\"driver\": \"qcow2\", \"file\": {{\"driver\": \"file\", \"filename\": \"{}\"}},
            \"backing\": {{\"driver\": \"raw\", \"file\": {{\"driver\": \"file\", \"filename\": \"{}\"}}}}}}",
        text(&overlay),
        text(&base)
    );
    let commands =
        ["read -P 0x11 0 8M", "write -P 0x22 1M 3M", "write -P 0x33 8388096 512", "read -P 0x22 1M 3M"];
    for command in commands {
        let output = tool("qemu-io", &["-c", command, &image]);
        assert!(!output.contains("failed"), "{command}: {output}");
    }
    tool("qemu-img", &["check", "-f", "qcow2", text(&overlay)]);
    let read = tool("qemu-io", &["-c", "read -P 0x11 4M 1M", "-c", "read -P 0x33 8388096 512", &image]);
    assert!(!read.contains("failed"), "{read}");
}

#[test]
fn impossible_overlays_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("x");
    for (size, bits) in [(0, 16), (513, 16), (u64::MAX - 511, 16), (1 << 50, 12)] {
        assert!(matches!(create_overlay(&path, size, bits), Err(DiskError::BadSize { .. })), "{size} {bits}");
    }
    for bits in [0, 11, 22, 64] {
        assert!(
            matches!(create_overlay(&path, 1 << 20, bits), Err(DiskError::BadClusterBits { .. })),
            "{bits}"
        );
    }
    assert!(!path.exists());
    fs::write(&path, "mine").expect("write");
    assert!(
        matches!(create_overlay(&path, 1 << 20, 16), Err(DiskError::Io { .. })),
        "never over another file"
    );
    assert_eq!(fs::read(&path).expect("read"), b"mine");
}

#[test]
fn what_qemu_makes_is_recognised() {
    let folder = tempfile::tempdir().expect("folder");
    let at = |name: &str| folder.path().join(name);
    fs::write(at("raw"), vec![0; 1000]).expect("raw");
    let expected = Probe { format: DiskFormat::Raw, virtual_size_bytes: 1024, has_backing: false };
    assert_eq!(probe(&at("raw")).expect("raw"), expected);

    let qcow2 = at("q");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&qcow2), "1G"]);
    probe(&qcow2).expect("qcow2").standalone(&qcow2).expect("alone");
    let old = at("old");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", text(&old), "1G"]);
    assert_eq!(probe(&old).expect("version 2").virtual_size_bytes, 1 << 30);

    let child = at("child");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&qcow2), "-F", "qcow2", text(&child)]);
    let probed = probe(&child).expect("child");
    assert!(probed.has_backing);
    assert!(matches!(probed.standalone(&child), Err(DiskError::HasBackingFile { .. })));

    let external = at("external");
    let option = format!("data_file={}", text(&at("data")));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, text(&external), "1M"]);
    assert!(matches!(probe(&external), Err(DiskError::ExternalDataFile { .. })));

    for (format, name) in [("vmdk", "VMDK"), ("vdi", "VDI"), ("vhdx", "VHDX"), ("qed", "QED"), ("vpc", "VHD")]
    {
        let path = at(format);
        tool("qemu-img", &["create", "-q", "-f", format, text(&path), "8M"]);
        let error = probe(&path).expect_err("foreign");
        assert!(
            matches!(error, DiskError::UnsupportedFormat { format, .. } if format == name),
            "{format}: {error}"
        );
    }
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("image");
    create_overlay(&path, 1 << 20, 16).expect("create");
    let good = fs::read(&path).expect("read");
    let cases: [(usize, &[u8], &str); 8] = [
        (4, &[0, 0, 0, 9], "version 9"),
        (20, &[0xff; 4], "2^4294967295"),
        (32, &[0, 0, 0, 2], "encrypted (method 2)"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "in another file"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 2], "marked as corrupt"),
        (72, &[0, 0, 0, 0, 0, 1, 0, 0], "features 0x10000"),
        (24, &[0xff; 8], "a size of 18446744073709551615"),
        (24, &[0; 8], "a size of 0"),
    ];
    for (at, bytes, expected) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, &bad).expect("write");
        let error = probe(&path).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    fs::write(&path, &good[..40]).expect("write");
    assert!(matches!(probe(&path), Err(DiskError::TooShort { length_bytes: 40, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn arbitrary_headers_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), magic: bool) {
        if magic && bytes.len() > 8 {
            bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        }
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("image");
        fs::write(&path, &bytes).expect("write");
        if let Ok(probe) = probe(&path) {
            prop_assert!(probe.virtual_size_bytes.is_multiple_of(512));
        }
    }
}

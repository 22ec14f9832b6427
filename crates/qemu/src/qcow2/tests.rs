//! Against `qemu-img`: what it writes is read, what is written it finds sound and the same.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::command_line::DiskFormat;

const MIB: u64 = 1 << 20;

fn tool(arguments: &[&str]) -> String {
    let output =
        Command::new("qemu-img").args(arguments).output().expect("qemu-img (in Debian's qemu-utils) runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A disk with holes, text, noise, and an end within a cluster.
fn sample(folder: &Path) -> (std::path::PathBuf, Vec<u8>) {
    let mut bytes = vec![0; (5 * MIB + 512) as usize];
    let mut state = 1_u64;
    for (index, byte) in bytes.iter_mut().enumerate() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        match index / (300 << 10) % 3 {
            0 => *byte = (state >> 56) as u8,
            1 => *byte = b"all work and no play "[index % 21],
            _ => {}
        }
    }
    let path = folder.join("sample.raw");
    std::fs::write(&path, &bytes).expect("write");
    (path, bytes)
}

fn open(path: &Path) -> Image<FileBytes> {
    Image::open(FileBytes::new(File::open(path).expect("open")).expect("length")).expect("an image")
}

#[test]
fn images_of_every_kind_are_read() {
    let folder = tempfile::tempdir().expect("folder");
    let (raw, bytes) = sample(folder.path());
    let image = folder.path().join("image.qcow2");
    for options in [
        &["-o", "compat=1.1"][..],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=4096"],
        &["-o", "cluster_size=2M"],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-c", "-o", "cluster_size=2M"],
    ] {
        tool(&[&["convert", "-f", "raw", "-O", "qcow2"], options, &[text(&raw), text(&image)]].concat());
        let mut opened = open(&image);
        assert_eq!(opened.virtual_bytes(), bytes.len() as u64);
        let mut read = vec![1; bytes.len()];
        opened.read(0, &mut read).expect("read");
        assert!(read == bytes, "{options:?}");
        // Across clusters, and from within them.
        let mut part = vec![1; 200_000];
        opened.read(99_999, &mut part).expect("read");
        assert!(part == bytes[99_999..299_999], "{options:?}");
        let mut last = None;
        opened
            .each_cluster(|cluster, found| {
                assert!(last.replace(cluster).is_none_or(|last| last < cluster));
                assert_ne!(found, Cluster::Unallocated);
                Ok::<_, ImageError>(())
            })
            .expect("clusters");
    }
    for (options, what) in [("extended_l2=on", "extended"), ("data_file=other.raw", "another file")] {
        let option = options.replace("other.raw", text(&folder.path().join("other.raw")));
        tool(&["create", "-q", "-f", "qcow2", "-o", &option, text(&image), "1M"]);
        let refused = Image::open(FileBytes::new(File::open(&image).expect("open")).expect("length"));
        let refused = refused.expect_err("not supported").to_string();
        assert!(refused.contains(what), "{refused}");
    }
}

#[test]
fn what_is_written_is_sound_and_the_same() {
    let folder = tempfile::tempdir().expect("folder");
    let (raw, bytes) = sample(folder.path());
    let path = folder.path().join("written.qcow2");
    let file = File::create_new(&path).expect("create");
    let mut writer = ImageWriter::new(bytes.len() as u64);
    // In no order, as several threads do.
    let clusters: Vec<&[u8]> = bytes.chunks(WRITTEN_CLUSTER_BYTES as usize).collect();
    for step in 0..clusters.len() {
        let cluster = step * 7 % clusters.len();
        if clusters[cluster].iter().any(|byte| *byte != 0) {
            let at = writer.allocate(cluster as u64);
            file.write_all_at(clusters[cluster], at).expect("write");
        }
    }
    writer.finish(&file, None).expect("finish");
    tool(&["check", "-f", "qcow2", text(&path)]);
    tool(&["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&raw)]);
    let mut read = vec![1; bytes.len()];
    open(&path).read(0, &mut read).expect("read");
    assert!(read == bytes);

    // Over another: one cluster changed, one zero.
    let over = folder.path().join("over.qcow2");
    let file = File::create_new(&over).expect("create");
    let mut writer = ImageWriter::new(bytes.len() as u64);
    let at = writer.allocate(1);
    file.write_all_at(&[7; 65536], at).expect("write");
    writer.zero(2);
    writer.finish(&file, Some(Backing { path: &path, format: DiskFormat::Qcow2 })).expect("finish");
    tool(&["check", "-f", "qcow2", text(&over)]);
    let info = tool(&["info", "--output=json", text(&over)]);
    assert!(info.contains(&format!("\"backing-filename\": \"{}\"", text(&path))), "{info}");
    assert!(info.contains("\"backing-filename-format\": \"qcow2\""), "{info}");
    let mut changed = bytes.clone();
    changed[65536..131_072].fill(7);
    changed[131_072..196_608].fill(0);
    std::fs::write(&raw, changed).expect("write");
    tool(&["compare", "-f", "qcow2", "-F", "raw", text(&over), text(&raw)]);
}

#[test]
fn empty_and_very_large_images_are_sound() {
    let folder = tempfile::tempdir().expect("folder");
    for (name, bytes, writes) in
        [("small", 512, 0), ("large", MAX_VIRTUAL_BYTES, 3), ("many", 40 << 30, 33_000)]
    {
        let path = folder.path().join(name);
        let file = File::create_new(&path).expect("create");
        let mut writer = ImageWriter::new(bytes);
        for cluster in 0..writes {
            let _offset = writer.allocate(cluster * (bytes / WRITTEN_CLUSTER_BYTES / writes));
        }
        writer.finish(&file, None).expect("finish");
        tool(&["check", "-f", "qcow2", text(&path)]);
        let info = tool(&["info", "--output=json", text(&path)]);
        assert!(info.contains(&format!("\"virtual-size\": {bytes}")), "{info}");
    }
}

/// In memory.
struct Bytes(Vec<u8>);

impl ReadAt for Bytes {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let end = at.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(self.0.get(at..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn length(&self) -> u64 {
        self.0.len() as u64
    }
}

fn small() -> Vec<u8> {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("small.qcow2");
    let file = File::create_new(&path).expect("create");
    let mut writer = ImageWriter::new(3 * MIB);
    for cluster in [0, 5, 47] {
        let at = writer.allocate(cluster);
        file.write_all_at(&[9; 65536], at).expect("write");
    }
    writer.finish(&file, None).expect("finish");
    std::fs::read(&path).expect("read")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// A guest's host writes these; all the same nothing panics, nor goes on for ever.
    #[test]
    fn no_change_to_an_image_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        keep in any::<prop::sample::Index>(),
    ) {
        let mut bytes = small();
        // Where something stands: the header, and the tables at the end.
        let places: Vec<usize> = (0..bytes.len()).filter(|at| *at < 120 || bytes[*at] != 9 && bytes[*at] != 0).collect();
        for (at, with) in changes {
            let at = places[at.index(places.len())];
            bytes[at] = with;
        }
        if keep.index(2) == 0 {
            bytes.truncate(keep.index(bytes.len()));
        }
        if let Ok(mut image) = Image::open(Bytes(bytes)) {
            let mut buffer = vec![0; 300_000];
            let _ = image.read(60_000, &mut buffer);
            let _ = image.each_cluster(|_, _| Ok::<_, ImageError>(()));
        }
    }
}

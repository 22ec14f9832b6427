//! A full command line, written out, and what is refused.

use super::*;

fn config() -> MachineConfig {
    MachineConfig {
        name: "web,1".into(),
        machine_type: DEFAULT_MACHINE_TYPE.into(),
        cpu_model: "qemu64,+sse4.2".into(),
        accelerator: Accelerator::Tcg,
        vcpus: 2,
        memory_bytes: 256 << 20,
        boot: BootSource::Kernel {
            kernel: "/k,1".into(),
            initrd: Some("/i".into()),
            cmdline: "console=ttyS0 a,b".into(),
        },
        nics: vec![NicConfig { mac: [0x52, 0x54, 0, 1, 2, 0xff], mtu: 1450, socket: "/run/n,0".into() }],
        disks: vec![DiskConfig {
            name: "root".into(),
            chain: vec![
                DiskLayer { path: "/base".into(), format: DiskFormat::Raw },
                DiskLayer { path: "/over,lay".into(), format: DiskFormat::Qcow2 },
            ],
        }],
        ram: RamSource::File { path: "/dev/shm/ram".into() },
        sockets: Sockets {
            qmp: Listener::Fd(5),
            qmp_cut: Listener::Path("/run/a,b".into()),
            qmp_pivot: Listener::Path("/run/pivot".into()),
            serial: Listener::Path("/run/serial".into()),
            serial_log: "/log,1".into(),
            guest_agent: Listener::Path("/run/qga".into()),
        },
        incoming: true,
        sandbox: true,
        tb_size_mib: 32,
        vmgenid: Some([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]),
    }
}

/// One option a line.
fn lines(config: &MachineConfig) -> String {
    let mut text = String::new();
    for argument in arguments(config).expect("valid") {
        let argument = argument.to_str().expect("UTF-8").to_owned();
        text.push_str(if text.is_empty() {
            ""
        } else if argument.starts_with('-') {
            "\n"
        } else {
            " "
        });
        text.push_str(&argument);
    }
    text
}

#[test]
fn the_whole_command_line() {
    let expected = r#"-name web,,1,debug-threads=on
-nodefaults
-no-user-config
-no-shutdown
-display none
-vga none
-msg timestamp=on
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-S
-incoming defer
-machine pc-q35-7.2,memory-backend=ram0,usb=off,vmport=off,sata=off,smbus=off
-accel tcg,thread=multi,tb-size=32
-cpu qemu64,+sse4.2
-smp 2
-m 256M
-object {"id":"ram0","mem-path":"/dev/shm/ram","qom-type":"memory-backend-file","share":false,"size":268435456}
-rtc base=utc,clock=vm
-kernel /k,1
-initrd /i
-append console=ttyS0 a,b
-device {"driver":"vmgenid","guid":"00010203-0405-0607-0809-0a0b0c0d0e0f","id":"vmgenid0"}
-object {"filename":"/dev/urandom","id":"rng0","qom-type":"rng-random"}
-device {"addr":"0x1","bus":"pcie.0","disable-legacy":"off","disable-modern":true,"driver":"virtio-rng-pci","id":"rng-device0","rng":"rng0"}
-chardev socket,id=qmp,fd=5,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev socket,id=qmp-cut,path=/run/a,,b,server=on,wait=off
-mon chardev=qmp-cut,mode=control
-chardev socket,id=qmp-pivot,path=/run/pivot,server=on,wait=off
-mon chardev=qmp-pivot,mode=control
-chardev socket,id=serial0,path=/run/serial,server=on,wait=off,logfile=/log,,1,logappend=on
-serial chardev:serial0
-chardev socket,id=agent0,path=/run/qga,server=on,wait=off
-device {"addr":"0x2","bus":"pcie.0","disable-legacy":"off","disable-modern":true,"driver":"virtio-serial-pci","id":"virtio-serial0","max_ports":2}
-device {"bus":"virtio-serial0.0","chardev":"agent0","driver":"virtserialport","id":"agent-port0","name":"org.qemu.guest_agent.0","nr":1}
-blockdev {"discard":"unmap","driver":"raw","file":{"discard":"unmap","driver":"file","filename":"/base","node-name":"root-0-file","read-only":true},"node-name":"root-0","read-only":true}
-blockdev {"backing":"root-0","discard":"unmap","driver":"qcow2","file":{"discard":"unmap","driver":"file","filename":"/over,lay","node-name":"root-1-file","read-only":false},"node-name":"root-1","read-only":false}
-device {"addr":"0x3","bootindex":1,"bus":"pcie.0","disable-legacy":"off","disable-modern":true,"drive":"root-1","driver":"virtio-blk-pci","id":"disk-root","serial":"root"}
-netdev {"addr":{"path":"/run/n,0","type":"unix"},"id":"net0","server":true,"type":"stream"}
-device {"addr":"0xb","bus":"pcie.0","disable-legacy":"off","disable-modern":true,"driver":"virtio-net-pci","host_mtu":1450,"id":"nic0","mac":"52:54:00:01:02:ff","netdev":"net0","romfile":"","rx_queue_size":1024,"x-txburst":32}"#;
    assert_eq!(lines(&config()), expected);
}

#[test]
fn a_fresh_machine_has_its_own_memory() {
    let fresh = MachineConfig {
        incoming: false,
        ram: RamSource::Anonymous,
        sandbox: false,
        vmgenid: None,
        ..config()
    };
    let text = lines(&fresh);
    assert!(text.contains("\"memory-backend-ram\"") && !text.contains("memory-backend-file"));
    for absent in ["-incoming", "-sandbox", "vmgenid"] {
        assert!(!text.contains(absent), "{absent}");
    }
}

#[test]
fn the_transmit_burst_keeps_a_flush_within_the_socket() {
    for (mtu, expected) in [(68, 32), (1500, 32), (4000, 16), (9000, 7), (40000, 1), (65535, 1)] {
        let mut config = config();
        config.nics[0].mtu = mtu;
        assert!(lines(&config).contains(&format!("\"x-txburst\":{expected}}}")), "{mtu}");
    }
}

#[test]
fn every_slot_is_used_once() {
    let mut config = config();
    config.nics = vec![config.nics[0].clone(); MAX_NICS];
    config.disks = (0..MAX_DISKS)
        .map(|index| DiskConfig { name: format!("d{index}"), ..config.disks[0].clone() })
        .collect();
    let mut slots: Vec<String> = arguments(&config)
        .expect("valid")
        .iter()
        .filter_map(|argument| serde_json::from_str::<Value>(argument.to_str()?).ok())
        .filter_map(|device| Some(device["addr"].as_str()?.to_owned()))
        .collect();
    assert_eq!(slots.len(), 2 + MAX_DISKS + MAX_NICS);
    slots.sort();
    slots.dedup();
    assert_eq!(slots.len(), 2 + MAX_DISKS + MAX_NICS);
}

/// Checks the error that `change` makes.
fn refused(change: impl FnOnce(&mut MachineConfig), expected: &str) {
    let mut config = config();
    change(&mut config);
    let error = arguments(&config).expect_err(expected).to_string();
    assert!(error.contains(expected), "{error:?} lacks {expected:?}");
}

#[test]
fn impossible_machines_are_refused() {
    let nic = config().nics[0].clone();
    let disk = config().disks[0].clone();
    refused(|config| config.nics = vec![nic.clone(); 17], "17 NICs, at most 16");
    refused(|config| config.nics[0].mtu = 67, "MTU 67 of NIC 0");
    refused(|config| config.nics[0].socket = "/x".repeat(54).into(), "108 bytes long");
    refused(|config| config.sockets.serial = Listener::Path("/x".repeat(60).into()), "120 bytes long");
    refused(|config| config.disks = vec![disk.clone(); 9], "9 disks, at most 8");
    refused(|config| config.disks = vec![disk.clone(); 2], "two disks are named \"root\"");
    refused(|config| config.disks[0].chain.clear(), "disk \"root\" has no image");
    for name in ["", "a,b", "1", "this_name_is_too_long"] {
        refused(|config| config.disks[0].name = name.into(), "must be 1 to 20");
    }
    refused(
        |config| {
            config.boot = BootSource::Disk;
            config.disks.clear();
        },
        "boots from a disk but has none",
    );
    refused(|config| config.memory_bytes = 1000, "memory of 1000 bytes");
    refused(|config| config.memory_bytes = 0, "memory of 0 bytes");
    refused(|config| config.vcpus = 0, "0 virtual CPUs");
    refused(|config| config.machine_type = "q35,accel=kvm".into(), "machine type");
    refused(|config| config.cpu_model = "max -S".into(), "CPU model");
}

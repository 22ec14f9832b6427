//! What a run is made of, apart from chance: sizes, links, traffic, how long things take, and faults. All times are in
//! nanoseconds of simulated time; pairs are the least and the most, and a run draws in between.

/// A microsecond.
pub const US: u64 = 1_000;
/// A millisecond.
pub const MS: u64 = 1_000_000;

/// One run. [`Scenario::quiet`] is where to begin.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Decides everything that is drawn.
    pub seed: u64,
    /// How many hosts.
    pub hosts: usize,
    /// Machines on each, with one port each.
    pub machines_per_host: usize,
    /// Machines of one network.
    pub machines_per_network: usize,
    /// Machines of one network that are on the same host.
    pub machines_together: usize,
    /// Between hosts.
    pub link: Link,
    /// How long a machine waits between frames of its own.
    pub send_every_ns: (u64, u64),
    /// The share of frames to everybody in the network; the others are for one machine, which may answer.
    pub broadcast_ppm: u32,
    /// The share of frames for one machine that it answers.
    pub answer_ppm: u32,
    /// How long parts of a snapshot take on a host.
    pub work: Work,
    /// How many snapshots are taken, one after another.
    pub snapshots: u32,
    /// The time between the end of one and the start of the next.
    pub between_snapshots_ns: u64,
    /// What goes wrong while they are taken.
    pub faults: Faults,
    /// The protocol's deadlines.
    pub config: diorama_cut::Config,
    /// Whether every machine carries a whole vector clock; takes memory with the square of their number.
    pub vector_clocks: bool,
    /// Deliver frames without regard to colour: what a correct run is to be told apart from.
    pub sabotage: Option<Sabotage>,
}

/// The network between hosts. A packet or message takes the pair's delay and a jitter of its own, so later ones overtake.
#[derive(Clone, Debug)]
pub struct Link {
    /// One way, between the nearest and the farthest hosts.
    pub delay_ns: (u64, u64),
    /// Added to each packet.
    pub jitter_ns: u64,
    /// Lost.
    pub loss_ppm: u32,
    /// Delivered twice.
    pub repeat_ppm: u32,
    /// Control messages lost (they travel over TCP in truth, which repeats them; the protocol must do without).
    pub message_loss_ppm: u32,
}

/// How long a host works.
#[derive(Clone, Debug)]
pub struct Work {
    /// Preparing.
    pub prepare_ns: (u64, u64),
    /// From the hold of all ports until all machines are stopped.
    pub drain_ns: (u64, u64),
    /// From one machine's cut instant to the next's on the same host.
    pub cut_each_ns: (u64, u64),
    /// From the last cut instant until the ports are released.
    pub save_ns: (u64, u64),
    /// Capturing memory, in the background.
    pub capture_ns: (u64, u64),
    /// Keeping or discarding.
    pub finish_ns: (u64, u64),
    /// Writing the manifest.
    pub manifest_ns: (u64, u64),
}

/// What goes wrong, apart from what the link does. Times between events of a kind; 0 means never.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// A random host's agent dies.
    pub crash_every_ns: u64,
    /// How long it is away.
    pub away_ns: (u64, u64),
    /// A random part of the hosts is cut off from the rest.
    pub partition_every_ns: u64,
    /// For how long.
    pub partition_ns: (u64, u64),
    /// A step of a host's work fails.
    pub work_fails_ppm: u32,
    /// The time with faults; after it, one more snapshot is taken, and that must succeed.
    pub until_ns: u64,
}

/// How to break the rule on purpose, to show that the judge sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// What comes from other hosts is coloured with the receiver's epoch: nothing is held and nothing recorded.
    ForgetColour,
    /// One recorded frame is left out of each host's recording.
    LoseARecordedFrame,
}

impl Scenario {
    /// No faults, a link of a data centre, little traffic, one snapshot.
    pub fn quiet(seed: u64, hosts: usize, machines_per_host: usize) -> Self {
        Self {
            seed,
            hosts,
            machines_per_host,
            machines_per_network: 40,
            machines_together: 4,
            link: Link {
                delay_ns: (50 * US, 500 * US),
                jitter_ns: 100 * US,
                loss_ppm: 0,
                repeat_ppm: 0,
                message_loss_ppm: 0,
            },
            send_every_ns: (5 * MS, 50 * MS),
            broadcast_ppm: 20_000,
            answer_ppm: 500_000,
            work: Work {
                prepare_ns: (5 * MS, 20 * MS),
                drain_ns: (200 * US, 1500 * US),
                cut_each_ns: (5 * US, 50 * US),
                save_ns: (1500 * US, 4 * MS),
                capture_ns: (20 * MS, 60 * MS),
                finish_ns: (MS, 4 * MS),
                manifest_ns: (2 * MS, 10 * MS),
            },
            snapshots: 1,
            between_snapshots_ns: 20 * MS,
            faults: Faults::default(),
            config: diorama_cut::Config {
                deadline: std::time::Duration::from_secs(2),
                in_flight_deadline: std::time::Duration::from_millis(100),
                retry: std::time::Duration::from_millis(50),
                settle_deadline: std::time::Duration::from_millis(500),
                ..diorama_cut::Config::default()
            },
            vector_clocks: false,
            sabotage: None,
        }
    }

    /// A bad link, crashes, partitions and failures for `until_ns`, and snapshots as fast as they go.
    pub fn stormy(seed: u64, hosts: usize, machines_per_host: usize, until_ns: u64) -> Self {
        let mut scenario = Self::quiet(seed, hosts, machines_per_host);
        scenario.link.loss_ppm = 20_000;
        scenario.link.repeat_ppm = 20_000;
        scenario.link.jitter_ns = 2 * MS;
        scenario.link.message_loss_ppm = 20_000;
        scenario.snapshots = 60;
        scenario.faults = Faults {
            crash_every_ns: 400 * MS,
            away_ns: (5 * MS, 200 * MS),
            partition_every_ns: 700 * MS,
            partition_ns: (10 * MS, 600 * MS),
            work_fails_ppm: 2_000,
            until_ns,
        };
        scenario
    }
}

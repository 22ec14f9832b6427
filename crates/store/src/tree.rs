//! A file as a Merkle tree: its shape, its nodes, how it is built and walked. Pure.
//!
//! A file is cut into *leaves* of one size; only the last may be shorter. Above them stand *nodes* of up to
//! [`FANOUT`] addresses. How many levels there are follows from the number of leaves alone, so that one content has
//! exactly one tree:
//!
//! ```text
//!                 root                      level 2: one node
//!        /          |          \
//!    node 0       node 1      node 2        level 1: 16 addresses each, the last perhaps fewer
//!   /  ...  \    / ... \      /    \
//!  0   ...  15  16 ... 31    32 .. 40       level 0: leaves
//! ```
//!
//! Invariants:
//! * A node is the addresses of its children, one after another, and nothing else; its address is their hash.
//! * A leaf or a node under which all is zero has [`Address::ZERO`] and is stored nowhere.
//! * A file of one leaf has no node: its root is the leaf. An empty file's root is [`Address::ZERO`].

use crate::address::Address;

/// How many children a node has at most.
pub const FANOUT: usize = 16;
/// The size of a leaf of memory: what guests share and change is pages.
pub const PAGE_BYTES: u64 = 4096;
/// The size of a leaf of every other file: what qcow2 allocates is clusters of this size.
pub const CLUSTER_BYTES: u64 = 65536;

/// The longest node.
pub(crate) const NODE_BYTES_MAX: usize = FANOUT * Address::BYTES;

/// How a file is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The file's length.
    pub bytes: u64,
    /// The size of its leaves: [`PAGE_BYTES`] or [`CLUSTER_BYTES`].
    pub leaf_bytes: u64,
}

impl Shape {
    /// A machine's memory.
    pub fn memory(bytes: u64) -> Self {
        Self { bytes, leaf_bytes: PAGE_BYTES }
    }

    /// Any other file.
    pub fn file(bytes: u64) -> Self {
        Self { bytes, leaf_bytes: CLUSTER_BYTES }
    }

    /// How many leaves it has.
    pub fn leaves(&self) -> u64 {
        self.bytes.div_ceil(self.leaf_bytes)
    }

    /// How many levels of nodes stand above the leaves.
    pub fn depth(&self) -> u32 {
        let (mut depth, mut covered) = (0, 1_u64);
        while covered < self.leaves() {
            covered = covered.saturating_mul(FANOUT as u64);
            depth += 1;
        }
        depth
    }

    /// Where a leaf starts.
    pub fn offset(&self, leaf: u64) -> u64 {
        leaf * self.leaf_bytes
    }

    /// How long a leaf is.
    pub fn leaf_length(&self, leaf: u64) -> u64 {
        self.leaf_bytes.min(self.bytes - self.offset(leaf))
    }

    /// How many leaves stand below one child of a node at this level (1 is the lowest).
    pub(crate) fn span(level: u32) -> u64 {
        (FANOUT as u64).saturating_pow(level - 1)
    }

    /// How many children the node has at this level whose first leaf is this one.
    pub fn children(&self, level: u32, first_leaf: u64) -> usize {
        let rest = self.leaves() - first_leaf;
        // At most FANOUT.
        rest.div_ceil(Self::span(level)).min(FANOUT as u64) as usize
    }
}

/// Takes a node that is complete: its address and its bytes.
pub type Emit<'a, E> = &'a mut dyn FnMut(Address, &[u8]) -> Result<(), E>;

/// Grows a tree from its leaves' addresses, in order.
#[derive(Debug)]
pub struct Builder {
    /// The children that each node in the making has so far, from the lowest level up.
    open: Vec<Vec<Address>>,
    root: Address,
}

impl Builder {
    /// A tree of this shape.
    pub fn new(shape: &Shape) -> Self {
        Self { open: vec![Vec::with_capacity(FANOUT); shape.depth() as usize], root: Address::ZERO }
    }

    /// The next leaf. `emit` gets each node that is complete now and is not all zeros, children before parents.
    pub fn leaf<E>(&mut self, address: Address, emit: Emit<'_, E>) -> Result<(), E> {
        self.add(0, address, emit)
    }

    /// After the last leaf: the root.
    pub fn finish<E>(mut self, emit: Emit<'_, E>) -> Result<Address, E> {
        for level in 0..self.open.len() {
            if !self.open[level].is_empty() {
                self.close(level, emit)?;
            }
        }
        Ok(self.root)
    }

    fn add<E>(&mut self, level: usize, address: Address, emit: Emit<'_, E>) -> Result<(), E> {
        let Some(open) = self.open.get_mut(level) else {
            self.root = address;
            return Ok(());
        };
        open.push(address);
        if open.len() == FANOUT {
            self.close(level, emit)?;
        }
        Ok(())
    }

    fn close<E>(&mut self, level: usize, emit: Emit<'_, E>) -> Result<(), E> {
        let mut node = [0; NODE_BYTES_MAX];
        let open = &mut self.open[level];
        for (part, child) in node.chunks_exact_mut(Address::BYTES).zip(open.iter()) {
            part.copy_from_slice(child.as_bytes());
        }
        let node = &node[..open.len() * Address::BYTES];
        let zero = open.iter().all(Address::is_zero);
        open.clear();
        let address = if zero { Address::ZERO } else { Address::of(node) };
        if !zero {
            emit(address, node)?;
        }
        self.add(level + 1, address, emit)
    }
}

/// The addresses in a node that has to have this many.
pub fn children(node: &[u8], expected: usize) -> Option<impl Iterator<Item = Address> + '_> {
    (node.len() == expected * Address::BYTES).then(|| {
        node.chunks_exact(Address::BYTES).map(|bytes| {
            let mut address = [0; Address::BYTES];
            address.copy_from_slice(bytes);
            Address::from_bytes(address)
        })
    })
}

/// Where a node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// How many levels of nodes are below it, itself included.
    pub level: u32,
    /// The first leaf below it.
    pub first_leaf: u64,
    /// How many children it has to have.
    pub children: usize,
}

/// What [`walk`] calls on its way.
pub trait Visitor {
    /// What stops the walk.
    type Error;

    /// The bytes of the node at this place, or `None` to pass over everything below it.
    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, Self::Error>;

    /// A leaf that is not all zeros.
    fn leaf(&mut self, leaf: u64, address: &Address) -> Result<(), Self::Error>;
}

/// Visits nodes and leaves in order, passing over zeros. The visitor has checked a node's length.
pub fn walk<V: Visitor>(shape: &Shape, root: &Address, visitor: &mut V) -> Result<(), V::Error> {
    if shape.leaves() == 0 {
        return Ok(());
    }
    walk_from(shape, root, shape.depth(), 0, visitor)
}

fn walk_from<V: Visitor>(
    shape: &Shape,
    address: &Address,
    level: u32,
    first_leaf: u64,
    visitor: &mut V,
) -> Result<(), V::Error> {
    if address.is_zero() {
        return Ok(());
    }
    if level == 0 {
        return visitor.leaf(first_leaf, address);
    }
    let expected = shape.children(level, first_leaf);
    let place = Place { level, first_leaf, children: expected };
    let Some(node) = visitor.node(address, place)? else { return Ok(()) };
    let span = Shape::span(level);
    for (index, child) in children(&node, expected).into_iter().flatten().enumerate() {
        walk_from(shape, &child, level - 1, first_leaf + index as u64 * span, visitor)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    struct Collect<'a> {
        nodes: &'a HashMap<Address, Vec<u8>>,
        leaves: Vec<(u64, Address)>,
    }

    impl Visitor for Collect<'_> {
        type Error = String;

        fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, String> {
            let node = self.nodes.get(address).ok_or("no such node")?;
            if node.len() != place.children * 32 {
                return Err(format!("{} bytes at {place:?}", node.len()));
            }
            Ok(Some(node.clone()))
        }

        fn leaf(&mut self, leaf: u64, address: &Address) -> Result<(), String> {
            self.leaves.push((leaf, *address));
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn what_is_built_is_walked(leaves in prop::collection::vec(0_u8..4, 0..700), last in 1_u64..=4096) {
            let leaves: Vec<Address> = leaves
                .iter()
                .map(|kind| if *kind == 0 { Address::ZERO } else { Address::of(&[*kind]) })
                .collect();
            let bytes = match leaves.len() as u64 {
                0 => 0,
                count => (count - 1) * PAGE_BYTES + last,
            };
            let shape = Shape::memory(bytes);
            prop_assert_eq!(shape.leaves(), leaves.len() as u64);
            let mut nodes = HashMap::new();
            let mut emit = |address: Address, node: &[u8]| -> Result<(), Infallible> {
                assert_eq!(Address::of(node), address);
                assert!(node.iter().any(|byte| *byte != 0));
                nodes.insert(address, node.to_vec());
                Ok(())
            };
            let mut builder = Builder::new(&shape);
            for leaf in &leaves {
                builder.leaf(*leaf, &mut emit).unwrap();
            }
            let root = builder.finish(&mut emit).unwrap();
            let mut collect = Collect { nodes: &nodes, leaves: Vec::new() };
            prop_assert_eq!(walk(&shape, &root, &mut collect), Ok(()));
            let expected: Vec<(u64, Address)> =
                (0..).zip(leaves).filter(|(_, leaf)| !leaf.is_zero()).collect();
            prop_assert_eq!(collect.leaves, expected);
        }
    }

    #[test]
    fn shapes() {
        for (leaves, depth) in [(0, 0), (1, 0), (2, 1), (16, 1), (17, 2), (256, 2), (257, 3)] {
            assert_eq!(Shape::memory(leaves * 4096).depth(), depth, "{leaves}");
        }
        let shape = Shape::file(65536 + 1);
        assert_eq!((shape.leaves(), shape.leaf_length(0), shape.leaf_length(1)), (2, 65536, 1));
        // The largest memory, and the longest file there can be.
        assert_eq!(Shape::memory(4 << 40).depth(), 8);
        assert_eq!(Shape::file(u64::MAX).depth(), 12);
    }
}

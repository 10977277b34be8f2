//! A persistent ordered set of counted things, by number: what a version of the table stands on.
//!
//! A version's set never changes; the next one shares all of it but the path to what came or went. It is a treap: each
//! node has a rank that is a hash of its key, and no child outranks its parent, so the shape depends on the keys alone
//! and is balanced whatever the order of changes.

use std::sync::Arc;

/// A set; copying it is one increment.
pub(super) struct Tree<T>(Option<Arc<Node<T>>>);

struct Node<T> {
    key: u64,
    value: Arc<T>,
    low: Tree<T>,
    high: Tree<T>,
}

impl<T> Clone for Tree<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Node<T> {
    fn rank(&self) -> u64 {
        rank(self.key)
    }

    fn with(&self, low: Tree<T>, high: Tree<T>) -> Tree<T> {
        Tree(Some(Arc::new(Self { key: self.key, value: Arc::clone(&self.value), low, high })))
    }
}

/// Addresses differ in their middle bits only; this mixes all of them into all (a bijection, so ranks differ).
fn rank(key: u64) -> u64 {
    let key = (key ^ (key >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let key = (key ^ (key >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    key ^ (key >> 31)
}

impl<T> Tree<T> {
    pub(super) const EMPTY: Self = Self(None);

    /// What has the largest key that is not above `key`.
    pub(super) fn at_or_below(&self, key: u64) -> Option<&Arc<T>> {
        let (mut tree, mut best) = (self, None);
        while let Some(node) = &tree.0 {
            if node.key <= key {
                best = Some(&node.value);
                tree = &node.high;
            } else {
                tree = &node.low;
            }
        }
        best
    }

    /// What has this key.
    pub(super) fn get(&self, key: u64) -> Option<&Arc<T>> {
        let mut tree = self;
        while let Some(node) = &tree.0 {
            tree = match key.cmp(&node.key) {
                std::cmp::Ordering::Less => &node.low,
                std::cmp::Ordering::Greater => &node.high,
                std::cmp::Ordering::Equal => return Some(&node.value),
            };
        }
        None
    }

    /// The set with this value under this key; what was there under it is replaced.
    pub(super) fn with(&self, key: u64, value: &Arc<T>) -> Self {
        let Some(node) = &self.0 else {
            let value = Arc::clone(value);
            return Self(Some(Arc::new(Node { key, value, low: Self::EMPTY, high: Self::EMPTY })));
        };
        if key < node.key {
            let low = node.low.with(key, value);
            match &low.0 {
                // What came outranks this node: it becomes the root of both.
                Some(top) if top.rank() > node.rank() => {
                    top.with(top.low.clone(), node.with(top.high.clone(), node.high.clone()))
                }
                _ => node.with(low, node.high.clone()),
            }
        } else if key > node.key {
            let high = node.high.with(key, value);
            match &high.0 {
                Some(top) if top.rank() > node.rank() => {
                    top.with(node.with(node.low.clone(), top.low.clone()), top.high.clone())
                }
                _ => node.with(node.low.clone(), high),
            }
        } else {
            let (low, high) = (node.low.clone(), node.high.clone());
            Self(Some(Arc::new(Node { key, value: Arc::clone(value), low, high })))
        }
    }

    /// The set without this key.
    pub(super) fn without(&self, key: u64) -> Self {
        let Some(node) = &self.0 else { return Self::EMPTY };
        match key.cmp(&node.key) {
            std::cmp::Ordering::Less => node.with(node.low.without(key), node.high.clone()),
            std::cmp::Ordering::Greater => node.with(node.low.clone(), node.high.without(key)),
            std::cmp::Ordering::Equal => Self::join(&node.low, &node.high),
        }
    }

    /// Both sets; every key of `low` is below those of `high`.
    fn join(low: &Self, high: &Self) -> Self {
        match (&low.0, &high.0) {
            (None, _) => high.clone(),
            (_, None) => low.clone(),
            (Some(a), Some(b)) if a.rank() > b.rank() => a.with(a.low.clone(), Self::join(&a.high, high)),
            (_, Some(b)) => b.with(Self::join(low, &b.low), b.high.clone()),
        }
    }

    /// Everything, by key.
    pub(super) fn iter(&self) -> Iter<'_, T> {
        let mut iter = Iter { path: Vec::new() };
        iter.descend(self);
        iter
    }
}

/// Everything in a set, by key.
pub(super) struct Iter<'a, T> {
    /// The nodes that are still to come, the next one last; of each, what is below it on the low side has been.
    path: Vec<&'a Node<T>>,
}

impl<'a, T> Iter<'a, T> {
    fn descend(&mut self, mut tree: &'a Tree<T>) {
        while let Some(node) = &tree.0 {
            self.path.push(node);
            tree = &node.low;
        }
    }
}

impl<'a, T> Iterator for Iter<'a, T> {
    type Item = &'a Arc<T>;

    fn next(&mut self) -> Option<&'a Arc<T>> {
        let node = self.path.pop()?;
        self.descend(&node.high);
        Some(&node.value)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Keys in order, no child above its parent in rank, and how deep it is.
    fn check(tree: &Tree<u64>, above: u64, low: u64, high: u64) -> usize {
        let Some(node) = &tree.0 else { return 0 };
        assert!((low..high).contains(&node.key) && node.rank() <= above);
        let depths = (
            check(&node.low, node.rank(), low, node.key),
            check(&node.high, node.rank(), node.key + 1, high),
        );
        1 + depths.0.max(depths.1)
    }

    #[test]
    fn as_a_map_and_old_ones_stay() {
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let (mut tree, mut model) = (Tree::EMPTY, BTreeMap::new());
        let mut kept = Vec::new();
        for step in 0..4000 {
            let key = (0x7f00 + random(300)) << 21;
            if random(2) == 0 {
                tree = tree.with(key, &Arc::new(step));
                model.insert(key, step);
            } else {
                tree = tree.without(key);
                model.remove(&key);
            }
            if step % 500 == 0 {
                kept.push((tree.clone(), model.clone()));
            }
            let probe = key + random(1 << 22);
            assert_eq!(
                tree.at_or_below(probe).map(|value| **value),
                model.range(..=probe).next_back().map(|(_, value)| *value)
            );
            assert_eq!(tree.get(key).map(|value| **value), model.get(&key).copied());
        }
        kept.push((tree, model));
        for (tree, model) in kept {
            assert!(tree.iter().map(|value| **value).eq(model.values().copied()));
            assert!(check(&tree, u64::MAX, 0, u64::MAX) < 24);
        }
    }

    #[test]
    fn neighbouring_sets_share_what_did_not_change() {
        let value = Arc::new(());
        let mut tree = Tree::EMPTY;
        for key in 0..1000 {
            tree = tree.with(key << 21, &value);
        }
        assert_eq!(Arc::strong_count(&value), 1001);
        let next = tree.without(500 << 21);
        assert!(Arc::strong_count(&value) < 1001 + 60, "the path is new, nothing else");
        drop(tree);
        drop(next);
        assert_eq!(Arc::strong_count(&value), 1);
    }
}

//! The broken axis: how a sparse guest-physical address space becomes a picture of bounded size.
//!
//! A guest's map spans terabytes of which a few gigabytes are there, with 8 KiB slots beside 16 GiB ones; no one
//! scale shows it. The space is cut into [`Segment`]s. Within a segment everything is to one scale, the
//! segment's *cell*, chosen so that its smallest slot still gets a whole cell; segments may differ in scale, and
//! a hole too large for its neighbours' scale becomes a segment of its own, drawn as a break. Where to cut is a
//! shortest-path problem over the pieces in address order: fewest rows wins.
//!
//! The terminal picture and the SVG share this, so both cut at the same places.

/// A stretch between two neighbouring edges of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Some slot covers it (at some time).
    pub(crate) used: bool,
}

/// A stretch of the axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// log2 of the bytes one cell stands for; `None` for a hole that is not drawn to scale.
    pub(crate) cell_shift: Option<u32>,
}

impl Segment {
    /// Cells from the segment's first to the one `address` falls in. 0 in a hole.
    pub(crate) fn cell_of(&self, address: u64) -> u64 {
        match self.cell_shift {
            Some(shift) => (address.clamp(self.start, self.end) >> shift) - (self.start >> shift),
            None => 0,
        }
    }

    /// Cells that `[start, end)` occupies: the first, and one past the last.
    pub(crate) fn cells(&self, start: u64, end: u64) -> (u64, u64) {
        (self.cell_of(start), self.cell_of(end.max(start + 1) - 1) + 1)
    }

    /// Cells of the whole segment.
    pub(crate) fn len(&self) -> u64 {
        self.cells(self.start, self.end).1
    }
}

/// Cuts the space at every edge of `ranges`; holes between them become unused pieces.
pub(crate) fn pieces(ranges: &[(u64, u64)]) -> Vec<Piece> {
    let mut edges: Vec<u64> = ranges.iter().flat_map(|&(start, end)| [start, end]).collect();
    edges.sort_unstable();
    edges.dedup();
    let mut opens: Vec<u64> = ranges.iter().map(|range| range.0).collect();
    let mut closes: Vec<u64> = ranges.iter().map(|range| range.1).collect();
    opens.sort_unstable();
    closes.sort_unstable();
    let (mut opened, mut closed) = (0, 0);
    edges
        .windows(2)
        .map(|pair| {
            while opens.get(opened).is_some_and(|&at| at <= pair[0]) {
                opened += 1;
            }
            while closes.get(closed).is_some_and(|&at| at <= pair[0]) {
                closed += 1;
            }
            Piece { start: pair[0], end: pair[1], used: opened > closed }
        })
        .collect()
}

/// Chooses the segments for rows of `width` cells, none higher than `max_rows`.
pub(crate) fn segments(pieces: &[Piece], width: u64, max_rows: u64) -> Vec<Segment> {
    let width = width.max(1);
    // best[n]: the cheapest way to lay out the first n pieces, and where its last segment begins.
    let mut best: Vec<(u64, usize)> = vec![(u64::MAX, 0); pieces.len() + 1];
    best[0].0 = 0;
    for first in 0..pieces.len() {
        let (mut smallest, mut largest_hole) = (u64::MAX, 0);
        for last in first..pieces.len() {
            let size = pieces[last].end - pieces[last].start;
            smallest = smallest.min(size);
            largest_hole = largest_hole.max(if pieces[last].used { 0 } else { size });
            let one = first == last;
            if !pieces[first].used && !one {
                break;
            }
            let rows = if one { 1 } else { rows(pieces[first].start, pieces[last].end, smallest, width) };
            // A hole of half a row and more says nothing by its length: better a break. Going on would only make
            // the scale finer, so neither limit can be met again.
            if !one && (rows > max_rows || largest_hole >> smallest.ilog2() > width / 2) {
                break;
            }
            if !pieces[last].used && !one {
                continue;
            }
            let cost = best[first].0.saturating_add(rows + u64::from(pieces[first].used));
            if cost < best[last + 1].0 {
                best[last + 1] = (cost, first);
            }
        }
    }
    let mut segments = Vec::new();
    let mut end = pieces.len();
    while end > 0 {
        let first = best[end].1;
        segments.push(segment(&pieces[first..end], width));
        end = first;
    }
    segments.reverse();
    segments
}

fn rows(start: u64, end: u64, smallest: u64, width: u64) -> u64 {
    let shift = smallest.max(1).ilog2();
    (((end - 1) >> shift) - (start >> shift) + 1).div_ceil(width)
}

fn segment(pieces: &[Piece], width: u64) -> Segment {
    let (start, end) = (pieces[0].start, pieces[pieces.len() - 1].end);
    let cell_shift = match pieces {
        [hole] if !hole.used => None,
        // Alone, a piece gets the finest scale at which it fits one row.
        [_] => (0..64).find(|shift| ((end - 1) >> shift) - (start >> shift) < width),
        several => several.iter().map(|piece| (piece.end - piece.start).ilog2()).min(),
    };
    Segment { start, end, cell_shift }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn small_slots_and_large_ones_do_not_share_a_scale() {
        let ranges = [(0, 0xa_0000), (0xc_0000, 0xc_4000), (0xc_4000, 0x10_0000), (MIB, 8192 * MIB)];
        let segments = segments(&pieces(&ranges), 60, 24);
        assert_eq!(segments.len(), 2);
        assert_eq!(segments[0].cell_shift, Some(14));
        assert_eq!((segments[1].start, segments[1].end), (MIB, 8192 * MIB));
    }

    #[test]
    fn a_huge_hole_is_a_break_and_a_small_one_is_to_scale() {
        let ranges = [(0, MIB), (2 * MIB, 3 * MIB), (1 << 40, (1 << 40) + MIB)];
        let segments = segments(&pieces(&ranges), 60, 24);
        let shifts: Vec<_> = segments.iter().map(|segment| segment.cell_shift).collect();
        assert_eq!(segments.len(), 3, "{segments:?}");
        assert_eq!(shifts[0], Some(20));
        assert_eq!(shifts[1], None);
    }

    #[test]
    fn every_piece_gets_a_cell_and_segments_cover_everything() {
        let mut state = 7_u64;
        for round in 0..200 {
            let (mut at, mut ranges) = (0_u64, Vec::new());
            for _ in 0..round % 40 + 1 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let size = 4096_u64 << (state >> 40 & 15);
                at += if state >> 33 & 1 == 0 { 0 } else { 4096 << (state >> 50 & 13) };
                ranges.push((at, at + size));
                at += size;
            }
            let pieces = pieces(&ranges);
            let segments = segments(&pieces, 60, 24);
            assert_eq!(segments[0].start, ranges[0].0);
            assert!(segments.windows(2).all(|pair| pair[0].end == pair[1].start));
            for &(start, end) in &ranges {
                let home = segments.iter().find(|s| s.start <= start && end <= s.end).expect("a segment");
                let (first, after) = home.cells(start, end);
                assert!(first < after && after <= home.len());
            }
        }
    }
}

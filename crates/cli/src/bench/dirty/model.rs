//! What a method costs, as a function of how much memory there is and how much of it is written:
//!
//! ```text
//! arm     = a0 + a1 * bytes
//! writes  =                   w * written pages
//! harvest = h0 + h1 * bytes + h2 * written pages
//! cycle   = writes + harvest
//! ```
//!
//! A walk over page tables costs by the byte, a page found costs by the page, and a call costs
//! something by itself. The coefficients are fitted by least squares of the relative error, as the
//! sizes span orders of magnitude, to all but the held-out sizes; those say how wrong it is.

use serde::Serialize;

const GIB: f64 = (1u64 << 30) as f64;

/// One measured point.
#[derive(Copy, Clone, Debug)]
pub(super) struct Point {
    pub(super) bytes: u64,
    pub(super) written: u64,
    pub(super) arm_ms: f64,
    pub(super) writes_ms: f64,
    pub(super) harvest_ms: f64,
}

/// The fitted coefficients; milliseconds.
#[derive(Copy, Clone, PartialEq, Debug, Serialize)]
pub(super) struct Model {
    pub(super) arm_ms: f64,
    pub(super) arm_ms_per_gib: f64,
    pub(super) write_us_per_page: f64,
    pub(super) harvest_ms: f64,
    pub(super) harvest_ms_per_gib: f64,
    pub(super) harvest_us_per_page: f64,
}

/// How far the model is from what was measured, on sizes that it was not fitted to.
#[derive(Copy, Clone, PartialEq, Debug, Serialize)]
pub(super) struct ModelError {
    pub(super) points: usize,
    /// Relative errors of a cycle's time: 0.1 is 10%.
    pub(super) cycle_median: f64,
    pub(super) cycle_max: f64,
    pub(super) arm_median: f64,
    pub(super) arm_max: f64,
}

impl Model {
    /// `None` when there are fewer than three points.
    pub(super) fn fit(points: &[Point]) -> Option<Self> {
        if points.len() < 3 {
            return None;
        }
        let gib = |point: &Point| point.bytes as f64 / GIB;
        let written = |point: &Point| point.written as f64 / 1e3;
        let arm = fit(points, |p| [1.0, gib(p), 0.0], |p| p.arm_ms);
        let writes = fit(points, |p| [0.0, 0.0, written(p)], |p| p.writes_ms);
        let harvest = fit(points, |p| [1.0, gib(p), written(p)], |p| p.harvest_ms);
        Some(Self {
            arm_ms: arm[0],
            arm_ms_per_gib: arm[1],
            write_us_per_page: writes[2],
            harvest_ms: harvest[0],
            harvest_ms_per_gib: harvest[1],
            harvest_us_per_page: harvest[2],
        })
    }

    pub(super) fn arm(&self, bytes: u64) -> f64 {
        self.arm_ms + self.arm_ms_per_gib * bytes as f64 / GIB
    }

    /// Milliseconds of a cycle in which `written` pages are written.
    pub(super) fn cycle(&self, bytes: u64, written: u64) -> f64 {
        self.harvest_ms
            + self.harvest_ms_per_gib * bytes as f64 / GIB
            + (self.harvest_us_per_page + self.write_us_per_page) * written as f64 / 1e3
    }

    /// `None` without points.
    pub(super) fn error(&self, points: &[Point]) -> Option<ModelError> {
        let relative = |predicted: f64, measured: f64| (predicted / measured - 1.0).abs();
        let sorted = |of: &dyn Fn(&Point) -> f64| {
            let mut errors: Vec<f64> = points.iter().map(of).collect();
            errors.sort_by(f64::total_cmp);
            errors
        };
        let cycle =
            sorted(&|p| relative(self.cycle(p.bytes, p.written), p.writes_ms + p.harvest_ms));
        let arm = sorted(&|p| relative(self.arm(p.bytes), p.arm_ms));
        Some(ModelError {
            points: points.len(),
            cycle_median: super::super::median::median(cycle.clone()),
            cycle_max: *cycle.last()?,
            arm_median: super::super::median::median(arm.clone()),
            arm_max: *arm.last()?,
        })
    }

    /// The size in bytes from which on `self` is cheaper than `other` for a cycle in which this
    /// share of the pages is written; `None` if one of them is cheaper at every size.
    pub(super) fn overtakes(&self, other: &Self, share: f64) -> Option<u64> {
        let pages_per_gib = GIB / 4096.0;
        let per_gib = |model: &Self| {
            model.harvest_ms_per_gib
                + (model.harvest_us_per_page + model.write_us_per_page) * share * pages_per_gib
                    / 1e3
        };
        let head_start = self.harvest_ms - other.harvest_ms;
        let gains = per_gib(other) - per_gib(self);
        (head_start > 0.0 && gains > 0.0).then(|| (head_start / gains * GIB) as u64)
    }
}

/// Coefficients, none below zero, of the features that make `value`, by least squares of relative
/// errors. A feature that is always zero, or that would get a coefficient below zero, gets zero.
fn fit(
    points: &[Point],
    features: impl Fn(&Point) -> [f64; 3],
    value: impl Fn(&Point) -> f64,
) -> [f64; 3] {
    // Below a microsecond it is the clock that is measured.
    let weighed: Vec<([f64; 3], f64)> = points
        .iter()
        .map(|point| {
            let scale = value(point).max(1e-3);
            (features(point).map(|feature| feature / scale), value(point) / scale)
        })
        .collect();
    // With three features, trying every subset is the non-negative least squares problem.
    let mut best = ([0.0; 3], f64::INFINITY);
    for subset in 1..8u8 {
        let used: Vec<usize> = (0..3).filter(|feature| subset >> feature & 1 == 1).collect();
        let Some(solved) = solve(&weighed, &used) else { continue };
        if solved.iter().any(|coefficient| *coefficient < 0.0) {
            continue;
        }
        let residual = weighed
            .iter()
            .map(|(row, value)| {
                let sum: f64 = row.iter().zip(&solved).map(|(a, b)| a * b).sum();
                (sum - value).powi(2)
            })
            .sum();
        if residual < best.1 {
            best = (solved, residual);
        }
    }
    best.0
}

/// Least squares with these features only, by the normal equations; `None` if they are singular.
fn solve(rows: &[([f64; 3], f64)], used: &[usize]) -> Option<[f64; 3]> {
    let n = used.len();
    let mut matrix = vec![vec![0.0; n + 1]; n];
    for (row, value) in rows {
        for (i, a) in used.iter().enumerate() {
            for (j, b) in used.iter().enumerate() {
                matrix[i][j] += row[*a] * row[*b];
            }
            matrix[i][n] += row[*a] * value;
        }
    }
    for pivot in 0..n {
        let largest = (pivot..n)
            .max_by(|a, b| matrix[*a][pivot].abs().total_cmp(&matrix[*b][pivot].abs()))?;
        matrix.swap(pivot, largest);
        let scale: f64 = rows.iter().map(|(row, _)| row[used[pivot]].powi(2)).sum();
        if matrix[pivot][pivot].abs() <= scale * 1e-12 {
            return None;
        }
        let above = matrix[pivot].clone();
        for (i, row) in matrix.iter_mut().enumerate() {
            if i != pivot {
                let factor = row[pivot] / above[pivot];
                row.iter_mut().zip(&above).for_each(|(a, b)| *a -= factor * b);
            }
        }
    }
    let mut solved = [0.0; 3];
    for (i, feature) in used.iter().enumerate() {
        solved[*feature] = matrix[i][n] / matrix[i][i];
    }
    Some(solved)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRUE: Model = Model {
        arm_ms: 0.02,
        arm_ms_per_gib: 8.0,
        write_us_per_page: 1.5,
        harvest_ms: 0.01,
        harvest_ms_per_gib: 0.5,
        harvest_us_per_page: 0.3,
    };

    fn points(sizes: &[u64], noise: f64) -> Vec<Point> {
        let mut sign = noise;
        let mut points = Vec::new();
        for size in sizes {
            for share in [0.001, 0.1, 0.5] {
                sign = -sign;
                let (bytes, pages) = (size << 20, (*size << 8) as f64);
                let written = (pages * share) as u64;
                let writes_ms = TRUE.write_us_per_page * written as f64 / 1e3;
                points.push(Point {
                    bytes,
                    written,
                    arm_ms: TRUE.arm(bytes) * (1.0 + sign),
                    writes_ms: writes_ms * (1.0 + sign),
                    harvest_ms: (TRUE.cycle(bytes, written) - writes_ms) * (1.0 + sign),
                });
            }
        }
        points
    }

    #[test]
    fn it_finds_what_made_the_points() {
        let model = Model::fit(&points(&[16, 64, 1024, 4096], 0.0)).unwrap();
        let pairs = [
            (model.arm_ms, TRUE.arm_ms),
            (model.arm_ms_per_gib, TRUE.arm_ms_per_gib),
            (model.write_us_per_page, TRUE.write_us_per_page),
            (model.harvest_ms, TRUE.harvest_ms),
            (model.harvest_ms_per_gib, TRUE.harvest_ms_per_gib),
            (model.harvest_us_per_page, TRUE.harvest_us_per_page),
        ];
        for (found, expected) in pairs {
            assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
        }
        let error = model.error(&points(&[256, 8192], 0.0)).unwrap();
        assert!(error.cycle_max < 1e-6 && error.arm_max < 1e-6, "{error:?}");
    }

    #[test]
    fn noise_shows_as_an_error_of_its_size() {
        let model = Model::fit(&points(&[16, 64, 1024, 4096], 0.1)).unwrap();
        let error = model.error(&points(&[256, 8192], 0.1)).unwrap();
        assert!(error.cycle_max > 0.02 && error.cycle_max < 0.3, "{error:?}");
    }

    #[test]
    fn no_cost_is_negative() {
        let mut points = points(&[16, 64, 1024], 0.0);
        for point in &mut points {
            // Falls with the size: an intercept is all that makes sense of it.
            point.arm_ms = 1.0 - point.bytes as f64 / (4u64 << 30) as f64;
        }
        let model = Model::fit(&points).unwrap();
        assert!(model.arm_ms > 0.0 && model.arm_ms_per_gib == 0.0, "{model:?}");
    }

    #[test]
    fn overtaking_is_where_the_two_meet() {
        let slow_start = Model { harvest_ms: 5.0, harvest_ms_per_gib: 0.1, ..TRUE };
        let size = slow_start.overtakes(&TRUE, 0.1).unwrap();
        let written = size / 4096 / 10;
        let (a, b) = (slow_start.cycle(size, written), TRUE.cycle(size, written));
        assert!((a / b - 1.0).abs() < 1e-3, "{a} {b}");
        assert_eq!(TRUE.overtakes(&slow_start, 0.1), None, "it begins ahead");
    }
}

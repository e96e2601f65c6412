//! The two pages of each vCPU, word by word.

macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Copy, Clone, Default, Debug)]
        pub(crate) struct $name { $($(#[$doc])* pub(crate) $field: u64),* }

        impl From<[u64; size_of::<$name>() / 8]> for $name {
            fn from([$($field),*]: [u64; size_of::<$name>() / 8]) -> Self {
                Self { $($field),* }
            }
        }

        impl From<$name> for [u64; size_of::<$name>() / 8] {
            fn from($name { $($field),* }: $name) -> Self {
                [$($field),*]
            }
        }
    };
}

words! {
    /// What a vCPU is to do.
    Parameters {
        /// Address of this page: what GS points to begins with it.
        own_address,
        report_address,
        operation,
        order,
        /// Number of the first unit.
        first,
        touches,
        rounds,
        progress_every,
        unit_shift,
        /// Bytes between two words.
        stride,
        /// Offset of a unit's last word.
        last,
        /// Units in the low part.
        low_units,
        low_base,
        /// What is added to the offset of a unit in the high part.
        high_base,
        zero_mask,
        written,
        /// What a word may differ by (xor) and still be right: 0, or `written`.
        accepted,
        permutation_count,
        permutation_mask,
        permutation_factor,
        permutation_addend,
        permutation_shift,
        permutation_mixer,
        permutation_start,
        /// Address of the table of unit numbers, 32 bits each.
        table,
        /// An address that is read last; 0: none is.
        stray,
    }
}

words! {
    /// What a vCPU saw, but for the histogram behind it.
    ReportPage {
        touches,
        mismatches,
        bad_address,
        bad_found,
        bad_expected,
        /// Time stamp counter's ticks.
        time_min,
        time_max,
        time_sum,
        rounds_left,
        until_progress,
        /// What words that are counted in differ by (xor) from what they were at first, before this
        /// round and after it.
        round_mask,
        next_round_mask,
        vector,
        error_code,
        /// CR2.
        fault_address,
        instruction,
        bank,
        bank_status,
        bank_address,
    }
}

/// Words of the report page before the histogram.
pub(crate) const REPORT_WORDS: usize = size_of::<ReportPage>() / 8;

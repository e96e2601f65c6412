//! Answering granules whose bytes have to be read, for every kind of image.

use pageferry_memory::{GranuleRange, Region};
use pageferry_paging::{PageSink, SinkError, SourceError, Span};

/// Fills bytes from an image offset on. Where it fails, the granules are poisoned.
pub(crate) type Read<'a> = dyn Fn(u64, &mut [u8]) -> Result<(), SourceError> + 'a;

/// Answers granules that have to be read: as one run, and around a place that cannot be read,
/// granule by granule.
pub(crate) fn serve_data(
    span: Span,
    region: &Region,
    sink: &dyn PageSink,
    read: &Read<'_>,
) -> Result<(), SinkError> {
    let granule = region.granule().bytes();
    let mut rest = span.granules;
    while !rest.is_empty() {
        let (start, _) = region.image_range(rest);
        let mut done = 0;
        let mut failed = 0;
        let answer = sink.fill(Span { granules: rest, ..span }, &mut |piece| {
            let answer = read(start.get() + done, piece);
            match answer {
                Ok(()) => done += piece.len() as u64,
                Err(_) => failed = piece.len() as u64,
            }
            answer
        });
        if failed == 0 {
            return answer;
        }
        // The sink's own troubles with one granule end there, unlike its end.
        let go_on = |answer| match answer {
            Err(SinkError::Install { .. }) => Ok(()),
            other => other,
        };
        // Everything before the failed piece is answered. Its granules are tried one by one, then
        // the run goes on behind it.
        let (_, unanswered) = rest.split_at(done / granule);
        let (suspects, after) =
            unanswered.split_at(failed.div_ceil(granule).min(unanswered.count()));
        if suspects.count() == 1 {
            go_on(sink.poison(Span { granules: suspects, ..span }))?;
        } else {
            for one in suspects.iter() {
                let one = Span { granules: GranuleRange::one(one), ..span };
                go_on(serve_one(one, region, sink, read))?;
            }
        }
        rest = after;
    }
    Ok(())
}

fn serve_one(
    span: Span,
    region: &Region,
    sink: &dyn PageSink,
    read: &Read<'_>,
) -> Result<(), SinkError> {
    let (start, _) = region.image_range(span.granules);
    let mut failed = false;
    let mut done = 0;
    let answer = sink.fill(span, &mut |piece| {
        let result = read(start.get() + done, piece);
        done += piece.len() as u64;
        failed |= result.is_err();
        result
    });
    if failed { sink.poison(span) } else { answer }
}

/// The region of a span, all of whose granules it has.
pub(crate) fn region_of(sink: &dyn PageSink, span: Span) -> Result<&Region, SourceError> {
    let region = sink.layout().get(span.region).map(|region| &**region);
    region
        .filter(|region| span.granules.end().get() <= region.granules())
        .ok_or_else(|| SourceError::Mismatch(SinkError::OutOfRange(span).to_string()))
}

/// What a sink's answer means to the one who asked.
pub(crate) fn answered(answer: Result<(), SinkError>) -> Result<(), SourceError> {
    match answer {
        Err(SinkError::Source(error)) => Err(error),
        Err(error @ (SinkError::OutOfRange(_) | SinkError::WrongLength { .. })) => {
            Err(SourceError::Mismatch(error.to_string()))
        }
        // The sink has dealt with the span itself.
        _ => Ok(()),
    }
}

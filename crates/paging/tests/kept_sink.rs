//! A source that keeps its sink for longer than the pager lives. Alone in its process, since it
//! counts the process's userfaultfds.

mod common;

use std::{fs, sync::Arc};

use common::*;
use pageferry_memory::Backing;
use pageferry_paging::{Pager, SinkError};

fn userfaultfds() -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    // The directory's own descriptor is gone by the time its link is read.
    let targets = open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    targets.filter(|target| target.to_string_lossy().contains("userfaultfd")).count()
}

#[test]
fn it_keeps_no_userfaultfd_open_and_is_heard_no_more() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(20);
    for delivery in DELIVERIES {
        let source = Arc::new(Pattern::default());
        let pager = Pager::builder(layout(Backing::Memfd, 64 << 12))
            .delivery(delivery)
            .start(Arc::clone(&source) as _)
            .unwrap();
        let sink = source.me.lock().unwrap().clone().unwrap();
        assert!(userfaultfds() > 0);
        drop(pager);
        assert_eq!(userfaultfds(), 0, "{delivery}");
        let late = sink.push(span(0, 1), &[1; 4096]);
        assert!(matches!(late, Err(SinkError::Stopped)), "{delivery}: {late:?}");
        assert_eq!(sink.layout().iter().count(), 1);
    }
}

//! The buffers that real drivers of virtio-net post. A shape is a list of lengths, and of whether the
//! device writes there.

/// The virtio-net header.
const HEADER: u32 = 12;
const PAGE: u32 = 4096;

/// How a driver posts buffers.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) buffers: Vec<(u32, bool)>,
    pub(crate) indirect: Option<usize>,
}

fn shape(name: &'static str, buffers: Vec<(u32, bool)>, indirect: Option<usize>) -> Shape {
    Shape { name, buffers, indirect }
}

/// All of them, for receiving and for sending.
pub(crate) fn all() -> Vec<Shape> {
    // `add_recvbuf_big`: the header, the rest of its page, and a page for each fragment (17) and one.
    let mut big = vec![(HEADER, true), (PAGE - HEADER, true)];
    big.extend([(PAGE, true); 17]);
    let mut fragments = vec![(HEADER + 54, false)];
    fragments.extend([(PAGE, false); 16]);
    vec![
        shape("Linux, mergeable", vec![(1536, true)], None),
        shape("Linux, big packets", big.clone(), Some(0)),
        shape("Linux, big packets without indirect tables", big, None),
        shape("Linux, small packets", vec![(HEADER, true), (1518, true)], Some(0)),
        shape("netkvm, header apart", vec![(HEADER, true), (1514, true)], None),
        shape("OpenBSD, header apart", vec![(HEADER, true), (2048 - HEADER, true)], None),
        shape("OSv, one page", vec![(PAGE, true)], None),
        shape("Linux sends, linear", vec![(HEADER + 1514, false)], None),
        shape("Linux sends, fragments", fragments, Some(0)),
        shape("Linux sends, three parts", vec![(HEADER, false), (66, false), (900, false)], None),
        shape("OpenBSD sends, header apart", vec![(HEADER, false), (60, false)], None),
        shape(
            "a header before the table",
            vec![(HEADER, false), (700, false), (9, false)],
            Some(1),
        ),
        shape("a command and its answer", vec![(2, false), (6, false), (1, true)], None),
    ]
}

//! `vmring bench`: short runs, which check what it prints and not how fast it is.

use super::*;

/// A short run in which every step succeeded.
fn bench(arguments: &[&str]) -> Value {
    let report = json(&[&["bench", "--json", "--seconds", "1"], arguments].concat());
    assert_eq!((&report["ok"], &report["failed"]), (&true.into(), &Value::Null));
    assert_eq!(report["interrupted"], false);
    report
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The median is between the least and the greatest value.
fn spread(value: &Value) {
    let [min, median, max] = ["min", "median", "max"].map(|name| number(&value[name]));
    assert!(min <= median && median <= max && max > 0.0, "{value}");
}

/// The place says how far the round trip of a cache line is.
fn whole_place(place: &Value) {
    let far = number(&place["round_trip_ns"]) >= 250.0;
    assert_eq!(place["distance"], if far { "far" } else { "near" }, "{place}");
}

/// Every figure is present, and nothing was lost.
fn whole(report: &Value, size: u64, batch: u64) {
    assert_eq!((&report["size"], &report["batch"]), (&size.into(), &batch.into()));
    let ways = report["one_way"].as_array().expect("a list");
    let names = |rows: &[Value]| -> Vec<String> {
        let names = rows.iter().map(|row| row["drive"].as_str().expect("a name").to_owned());
        names.collect()
    };
    let mut drives = names(ways);
    // Each place has a row.
    drives.dedup();
    assert_eq!(drives, ["inline", "poller"]);
    let rings = report["rings"].as_array().expect("a list");
    assert_eq!(names(rings), drives);
    for rings in rings {
        assert!(number(&rings["write_batches"]["mean"]) >= 1.0);
        assert!(number(&rings["read_batches"]["mean"]) >= 1.0);
    }
    for way in ways {
        let rates = &way["rates"];
        let least = if way["drive"] == "inline" { 5.0 } else { 1.0 };
        assert!(number(&rates["intervals"]) >= least, "{way}");
        for figure in ["packets_per_s", "gbit_per_s", "ns_per_packet"] {
            spread(&rates[figure]);
        }
        let (packets, gbit) = (&rates["packets_per_s"]["median"], &rates["gbit_per_s"]["median"]);
        let exact = number(packets) * size as f64 * 8.0 / 1e9;
        assert!((number(gbit) - exact).abs() < 0.01 + exact / 100.0, "{rates}");
    }
    let left_out = report["left_out"].as_array().expect("a list").len();
    let trips = report["round_trip"].as_array().expect("a list");
    let places = report["two_threads"].as_array().expect("a list");
    let mut kinds: Vec<_> = trips.iter().map(|trip| (&trip["drive"], &trip["waits"])).collect();
    kinds.dedup();
    assert_eq!(kinds.len() + usize::from(!places.is_empty()) + left_out, 4, "{report}");
    assert!(places.len() <= 2, "{report}");
    for place in places {
        for side in ["vmring", "bare_loop"] {
            for figure in ["packets_per_s", "gbit_per_s", "ns_per_packet"] {
                spread(&place[side][figure]);
            }
        }
        let of = |side: &str| number(&place[side]["ns_per_packet"]["median"]);
        let exact = of("vmring") / of("bare_loop");
        assert!((number(&place["times_bare_loop"]) - exact).abs() < 0.01, "{place}");
        whole_place(&place["place"]);
    }
    let alone = report["processors"] == 1;
    for run in ways.iter().chain(trips) {
        match alone || run["drive"] == "inline" {
            true => assert_eq!(run["place"], Value::Null, "{run}"),
            false => whole_place(&run["place"]),
        }
    }
    for name in ["place", "place_at_end"] {
        match alone {
            true => assert_eq!(report[name], Value::Null),
            false => whole_place(&report[name]),
        }
    }
    for trip in trips {
        let trips = &trip["trips"];
        assert!(number(&trips["count"]) > 0.0);
        let names = ["min_ns", "median_ns", "p99_ns", "p99_9_ns", "max_ns"];
        let values = names.map(|name| number(&trips[name]));
        assert!(values[0] > 0.0 && values.is_sorted(), "{trip}");
    }
    let packets = &report["packets"];
    assert!(number(&packets["sent"]) > 0.0);
    assert_eq!(packets["sent"], packets["arrived"]);
    for wrong in ["lost", "reordered", "duplicated", "corrupt", "refused"] {
        assert_eq!(packets[wrong], 0, "{packets}");
    }
    assert_eq!(report["drops"], 0);
    assert!(number(&report["checks"]["one_way_ns_per_packet"]) > 0.0);
}

/// With offload, packets that are to be cut, and packets of one frame whose checksum is left.
#[test]
fn packets_of_64_kib_are_measured_with_offload() {
    for (size, arguments) in [(65_549, &[][..]), (600, &["--size", "600"])] {
        let report = bench(&[&["--offload"], arguments].concat());
        whole(&report, size, 32);
        assert_eq!(report["offloads"], serde_json::json!(["checksum", "tso4", "virtio_header"]));
    }
    let too_long = refused(&["bench", "--offload", "--size", "65550"]);
    assert!(too_long.contains("70 to 65,549 bytes"), "{too_long}");
    assert!(refused(&["bench", "--offload", "--device", "loopback"]).contains("--offload is for"));
}

#[test]
fn a_bench_in_this_process_has_every_figure_and_loses_nothing() {
    for (device, size, batch) in
        [("embedded", 1514, 32), ("loopback", 60, 1), ("embedded", 60, 256)]
    {
        let (size_text, batch_text) = (size.to_string(), batch.to_string());
        let report = bench(&["--device", device, "--size", &size_text, "--batch", &batch_text]);
        assert_eq!(report["device"], device);
        whole(&report, size, batch);
    }
    // The defaults.
    whole(&bench(&[]), 1514, 32);
}

#[cfg(not(target_os = "macos"))]
#[test]
fn a_bench_runs_on_the_vmnet_driver_over_the_simulator() {
    whole(&bench(&["--device", "vmnet-sim"]), 1514, 32);
}

/// The kernel may lose packets, so the test does not require that none is lost.
#[cfg(target_os = "linux")]
#[test]
fn a_bench_runs_between_two_taps() {
    if !tap::is_possible() {
        return;
    }
    let report = bench(&["--device", "tap"]);
    assert_eq!((&report["device"], &report["may_lose"]), (&"tap".into(), &true.into()));
    assert!(["io_uring", "plain"].contains(&report["engine"].as_str().expect("a name")));
    assert!(number(&report["packets"]["arrived"]) > 0.0);
    assert_eq!(
        (&report["packets"]["corrupt"], &report["packets"]["duplicated"]),
        (&0.into(), &0.into())
    );
    assert_eq!(report["rings"].as_array().map(Vec::len), Some(2));
}

#[cfg(target_os = "linux")]
#[test]
fn without_root_a_bench_on_taps_says_what_is_missing() {
    let Some(output) = tap::without_root(&["bench", "--device", "tap", "--seconds", "1"]) else {
        return;
    };
    let message = text(&output.stderr).trim_end();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(text(&output.stdout), "");
    assert!(!message.contains('\n'), "one sentence: {message}");
    for words in ["permission denied", "CAP_SYS_ADMIN", "run as root"] {
        assert!(message.contains(words), "no {words} in {message}");
    }
}

#[test]
fn a_bench_ends_with_tables_for_people() {
    let output = vmring(&["bench", "--seconds", "1", "--device", "loopback"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for words in ["packets/s", "Gbit/s", "99.9 %", "parked", "Checked: ", "none was lost"] {
        assert!(text(&output.stdout).contains(words), "no {words} in {}", text(&output.stdout));
    }
    for words in ["One way, ns per packet\n", "One packet out and back, us\n", "█"] {
        assert!(text(&output.stdout).contains(words), "no {words} in {}", text(&output.stdout));
    }
    assert!(text(&output.stderr).contains("measuring"), "a person sees what it does");
}

#[test]
fn a_bench_that_cannot_be_is_refused_in_one_sentence() {
    for size in ["0", "59", "1515"] {
        let message = refused(&["bench", "--size", size]);
        assert!(message.contains("60 to 1,514 bytes"), "{message}");
    }
    assert!(refused(&["bench", "--size", "many"]).contains("many"));
    assert!(refused(&["bench", "--batch", "0"]).contains("0 is not in 1 to 256"));
    assert!(refused(&["bench", "--batch", "257"]).contains("257 is not in 1 to 256"));
    assert!(refused(&["bench", "--seconds", "0"]).contains("0 is not in"));
    for cpus in ["0", "one,two", "0,1,2", ","] {
        let message = refused(&["bench", "--cpus", cpus]);
        assert!(message.contains("two numbers of processors, like 0,1"), "{message}");
    }
    assert!(refused(&["bench", "--cpus", "1,1"]).contains("must be different"));
    let wrong = if cfg!(target_os = "linux") { "may not use processor 4095" } else { "--cpus" };
    assert!(refused(&["bench", "--cpus", "0,4095"]).contains(wrong));
    let message = refused(&["bench", "--device", "abacus"]);
    assert!(message.contains("abacus") && message.contains("loopback"), "{message}");
    if cfg!(not(target_os = "macos")) {
        assert!(refused(&["bench", "--device", "vmnet"]).contains("exists on macOS only"));
    }
    if cfg!(not(target_os = "linux")) {
        assert!(refused(&["bench", "--device", "tap"]).contains("exists on Linux only"));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_bench_uses_the_processors_that_it_is_given() {
    let report = bench(&["--size", "60"]);
    let Some([a, b]) = report["cpus"].as_array().map(Vec::as_slice) else {
        assert_eq!(report["processors"], 1);
        eprintln!("skipped: there is only one processor");
        return;
    };
    assert_ne!(a, b);
    let report = bench(&["--size", "60", "--cpus", &format!("{b},{a}")]);
    assert_eq!(report["cpus"], serde_json::json!([b, a]));
}

#[test]
fn a_bench_draws_its_figures() {
    let folder = scratch("plot");
    let file = folder.join("figures.svg");
    let report = bench(&["--plot", path(&file)]);
    let svg = std::fs::read_to_string(&file).expect("it was drawn");
    let document = roxmltree::Document::parse(&svg).expect("it is XML");
    let bars = document.descendants().filter(|node| node.attribute("class") == Some("bar"));
    let count = |name: &str| report[name].as_array().map_or(0, Vec::len);
    // A bar for vmring and one for the bare loop in each place.
    let wanted = count("one_way") + count("round_trip") + 2 * count("two_threads");
    assert_eq!(bars.count(), wanted, "{svg}");
    let texts: Vec<_> = document.descendants().filter_map(|node| node.text()).collect();
    let one_way = &report["one_way"][0]["rates"]["ns_per_packet"]["median"];
    let digits = if number(one_way) >= 99.95 { 0 } else { 1 };
    let figure = format!("{:.digits$}", number(one_way));
    for words in ["inline", "One way, ns per packet", &figure] {
        assert!(texts.contains(&words), "no {words} in {texts:?}");
    }
    // An older plot is replaced as a whole.
    std::fs::write(&file, "x".repeat(100_000)).expect("a file");
    bench(&["--device", "loopback", "--plot", path(&file)]);
    let svg = std::fs::read_to_string(&file).expect("it was drawn");
    assert!(roxmltree::Document::parse(&svg).is_ok(), "{svg}");
}

#[test]
fn a_plot_that_cannot_be_written_is_refused_and_leaves_nothing() {
    let folder = scratch("no plot");
    let nowhere = folder.join("no such folder").join("plot.svg");
    let message = refused(&["bench", "--plot", path(&nowhere)]);
    assert!(message.contains("cannot be written"), "{message}");
    // Another mistake is found after the file was opened.
    refused(&["bench", "--size", "1", "--plot", path(&folder.join("new.svg"))]);
    assert_eq!(std::fs::read_dir(&folder).expect("it is there").count(), 0);
    let old = folder.join("old.svg");
    std::fs::write(&old, "an older plot").expect("a file");
    refused(&["bench", "--size", "1", "--plot", path(&old)]);
    assert_eq!(std::fs::read_to_string(&old).expect("it is there"), "an older plot");
}

/// The way out belongs to the embedded network, whose packets all arrive whether it has one or not.
#[test]
fn a_bench_takes_the_way_out_of_the_embedded_network() {
    let deny = ["--deny", "10.0.0.0/8", "--allow", "10.0.0.53:53,udp", "--limit", "flows=16"];
    let deny = [&deny[..], &["--nat-workers", "2"]].concat();
    for options in [&[&deny[..], &["--forward", "0=192.168.64.2:22"]].concat()[..], &["--no-nat"]] {
        whole(&bench(options), 1514, 32);
    }
    // The forward is there: its port is taken.
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = taken.local_addr().expect("it has a port").port();
    let forward = format!("{port}=192.168.64.2:22");
    let output = vmring(&["bench", "--seconds", "1", "--forward", &forward]);
    let message = text(&output.stderr);
    assert!(
        !output.status.success() && message.contains("listening at the host's port"),
        "{message}"
    );
    let message = refused(&["bench", "--device", "loopback", "--dns", "9.9.9.9"]);
    assert!(message.contains("--dns cannot be used"), "{message}");
    assert!(refused(&["bench", "--limit", "flow=1"]).contains("NAME=NUMBER"));
    assert!(refused(&["bench", "--no-nat", "--limit", "flows=1"]).contains("cannot be used"));
    assert!(refused(&["bench", "--no-nat", "--nat-workers", "2"]).contains("cannot be used"));
    let message = refused(&["bench", "--device", "loopback", "--nat-workers", "2"]);
    assert!(message.contains("--nat-workers cannot be used"), "{message}");
    for number in ["0", "9", "many"] {
        let message = refused(&["bench", "--nat-workers", number]);
        assert!(message.contains("is no number from 1 to 8"), "{message}");
    }
}

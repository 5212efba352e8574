//! The vhost-user back end, against a front end of our own. No thread is needed: a test sends, lets
//! the session process, and reads.

mod frontend;

#[path = "vhost_user/harness.rs"]
mod harness;

#[path = "vhost_user/connections.rs"]
mod connections;
#[path = "vhost_user/hostile.rs"]
mod hostile;
#[path = "vhost_user/listeners.rs"]
mod listeners;
#[path = "vhost_user/logs.rs"]
mod logs;
#[path = "vhost_user/memories.rs"]
mod memories;
#[path = "vhost_user/orders.rs"]
mod orders;
#[path = "vhost_user/random.rs"]
mod random;
#[path = "vhost_user/requests.rs"]
mod requests;
#[path = "vhost_user/rings.rs"]
mod rings;

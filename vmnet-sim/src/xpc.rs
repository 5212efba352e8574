//! XPC objects: dictionaries, arrays and the values in them.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::{Arc, Mutex};

use crate::objects::{self, Kind, Life, lock, violation};
use crate::script::Value;

/// An object. Foreign code has it as a pointer from [`Arc::into_raw`].
pub(crate) enum Object {
    Dictionary(Mutex<BTreeMap<CString, Handle>>),
    Array(Vec<Handle>),
    U64(u64),
    Bool(bool),
    String(CString),
    Uuid([u8; 16]),
    /// An object that only the simulator understands: a port forwarding rule, or a network for
    /// another process.
    Opaque(Box<dyn std::any::Any + Send + Sync>),
}

impl Drop for Object {
    fn drop(&mut self) {
        drop(objects::unregister(ptr::from_ref(self)));
    }
}

/// A reference to an object.
#[derive(Clone)]
pub(crate) struct Handle(Arc<Object>);

impl Handle {
    pub(crate) fn new(object: Object) -> Self {
        let object = Arc::new(object);
        let memory = Box::new(Arc::downgrade(&object));
        objects::register(Arc::as_ptr(&object), Kind::Xpc, memory);
        Self(object)
    }

    pub(crate) fn dictionary() -> Self {
        Self::new(Object::Dictionary(Mutex::default()))
    }

    /// The pointer for a block's argument or another result at +0.
    pub(crate) fn as_raw(&self) -> *mut c_void {
        Arc::as_ptr(&self.0).cast_mut().cast()
    }

    /// The pointer for a result that the caller has to release.
    pub(crate) fn into_raw(self) -> *mut c_void {
        Arc::into_raw(self.0).cast_mut().cast()
    }

    pub(crate) fn set(&self, key: &CStr, value: Object) {
        let Object::Dictionary(entries) = &*self.0 else {
            violation("a value is set in an XPC object that is no dictionary");
        };
        lock(entries).insert(key.to_owned(), Handle::new(value));
    }

    pub(crate) fn object(&self) -> &Object {
        &self.0
    }
}

/// The object that a pointer from foreign code means.
///
/// # Safety
///
/// If `object` is a live XPC object, the caller must hold a reference to it for the lifetime `'a`.
/// The simulator aborts if no live XPC object has this address.
pub(crate) unsafe fn borrow<'a>(object: *const c_void, role: &str) -> (&'a Object, Life) {
    let life = objects::expect_live(object, Kind::Xpc, role);
    // SAFETY: `expect_live` has just found an Object here. The caller's reference keeps it alive
    // for `'a`.
    (unsafe { &*object.cast::<Object>() }, life)
}

/// A dictionary's entries as values, by the text of their key.
pub(crate) fn values(dictionary: &Object, role: &str) -> BTreeMap<String, Value> {
    let Object::Dictionary(entries) = dictionary else {
        violation(&format!("{role}: a dictionary is expected"));
    };
    let value = |handle: &Handle| match handle.object() {
        Object::U64(value) => Value::U64(*value),
        Object::Bool(value) => Value::Bool(*value),
        Object::String(value) => Value::Str(value.to_string_lossy().into_owned()),
        Object::Uuid(value) => Value::Uuid(*value),
        _ => violation(&format!("{role}: a value of an unexpected type")),
    };
    let text = |key: &CString| key.to_string_lossy().into_owned();
    lock(entries).iter().map(|(key, handle)| (text(key), value(handle))).collect()
}

/// # Safety
///
/// As for [`borrow`]; and `key` must be a C string.
unsafe fn get<T>(
    dictionary: *const c_void,
    key: *const c_char,
    role: &str,
    read: impl FnOnce(&Object) -> Option<T>,
) -> Option<T> {
    // SAFETY: guaranteed by the caller.
    let (object, key) = unsafe { (borrow(dictionary, role).0, CStr::from_ptr(key)) };
    let Object::Dictionary(entries) = object else {
        violation(&format!("{role}: the object is no dictionary"));
    };
    lock(entries).get(key).and_then(|value| read(value.object()))
}

/// # Safety
///
/// As for [`get`].
unsafe fn set(dictionary: *const c_void, key: *const c_char, value: Object, role: &str) {
    // SAFETY: guaranteed by the caller.
    let (object, key) = unsafe { (borrow(dictionary, role).0, CStr::from_ptr(key)) };
    let Object::Dictionary(entries) = object else {
        violation(&format!("{role}: the object is no dictionary"));
    };
    lock(entries).insert(key.to_owned(), Handle::new(value));
}

/// A type. Only its address matters.
#[repr(C)]
pub(crate) struct Type([usize; 4]);

#[unsafe(no_mangle)]
pub(crate) static _xpc_type_array: Type = Type([0; 4]);
#[unsafe(no_mangle)]
pub(crate) static _xpc_type_dictionary: Type = Type([0; 4]);
static OTHER_TYPE: Type = Type([0; 4]);

#[unsafe(no_mangle)]
pub(crate) extern "C" fn xpc_dictionary_create(
    _keys: *const *const c_char,
    _values: *const *mut c_void,
    count: usize,
) -> *mut c_void {
    if count != 0 {
        violation("xpc_dictionary_create: only empty ones are simulated");
    }
    Handle::dictionary().into_raw()
}

/// # Safety
///
/// As for [`borrow`]; and `key` must be a C string. The functions below have the same contract.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_dictionary_set_uint64(
    dictionary: *mut c_void,
    key: *const c_char,
    value: u64,
) {
    // SAFETY: guaranteed by the caller.
    unsafe { set(dictionary, key, Object::U64(value), "xpc_dictionary_set_uint64") }
}

/// # Safety
///
/// As for [`xpc_dictionary_set_uint64`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_dictionary_set_bool(
    dictionary: *mut c_void,
    key: *const c_char,
    value: bool,
) {
    // SAFETY: guaranteed by the caller.
    unsafe { set(dictionary, key, Object::Bool(value), "xpc_dictionary_set_bool") }
}

/// # Safety
///
/// As for [`xpc_dictionary_set_uint64`]; and `value` must be a C string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_dictionary_set_string(
    dictionary: *mut c_void,
    key: *const c_char,
    value: *const c_char,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let value = Object::String(CStr::from_ptr(value).to_owned());
        set(dictionary, key, value, "xpc_dictionary_set_string");
    }
}

/// # Safety
///
/// As for [`xpc_dictionary_set_uint64`]; and `value` must point at 16 bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_dictionary_set_uuid(
    dictionary: *mut c_void,
    key: *const c_char,
    value: *const [u8; 16],
) {
    // SAFETY: guaranteed by the caller.
    unsafe { set(dictionary, key, Object::Uuid(*value), "xpc_dictionary_set_uuid") }
}

/// # Safety
///
/// As for [`xpc_dictionary_set_uint64`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_dictionary_get_uint64(
    dictionary: *mut c_void,
    key: *const c_char,
) -> u64 {
    // SAFETY: guaranteed by the caller.
    let value = unsafe {
        get(dictionary, key, "xpc_dictionary_get_uint64", |value| match value {
            Object::U64(value) => Some(*value),
            _ => None,
        })
    };
    value.unwrap_or(0)
}

/// # Safety
///
/// As for [`xpc_dictionary_set_uint64`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_dictionary_get_string(
    dictionary: *mut c_void,
    key: *const c_char,
) -> *const c_char {
    // SAFETY: guaranteed by the caller.
    let value = unsafe {
        get(dictionary, key, "xpc_dictionary_get_string", |value| match value {
            Object::String(value) => Some(value.as_ptr()),
            _ => None,
        })
    };
    value.unwrap_or(ptr::null())
}

/// # Safety
///
/// As for [`xpc_dictionary_set_uint64`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_dictionary_get_uuid(
    dictionary: *mut c_void,
    key: *const c_char,
) -> *const [u8; 16] {
    // SAFETY: guaranteed by the caller.
    let value = unsafe {
        get(dictionary, key, "xpc_dictionary_get_uuid", |value| match value {
            Object::Uuid(value) => Some(ptr::from_ref(value)),
            _ => None,
        })
    };
    value.unwrap_or(ptr::null())
}

/// # Safety
///
/// As for [`borrow`].
unsafe fn elements<'a>(array: *const c_void, role: &str) -> &'a [Handle] {
    // SAFETY: guaranteed by the caller.
    match unsafe { borrow(array, role).0 } {
        Object::Array(elements) => elements,
        _ => violation(&format!("{role}: the object is no array")),
    }
}

/// # Safety
///
/// As for [`borrow`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_array_get_count(array: *mut c_void) -> usize {
    // SAFETY: guaranteed by the caller.
    unsafe { elements(array, "xpc_array_get_count") }.len()
}

/// # Safety
///
/// As for [`borrow`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_array_get_string(
    array: *mut c_void,
    index: usize,
) -> *const c_char {
    // SAFETY: guaranteed by the caller.
    match unsafe { elements(array, "xpc_array_get_string") }.get(index).map(Handle::object) {
        Some(Object::String(text)) => text.as_ptr(),
        Some(_) => ptr::null(),
        None => violation("xpc_array_get_string: the index is beyond the end"),
    }
}

/// # Safety
///
/// As for [`borrow`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_array_get_value(
    array: *mut c_void,
    index: usize,
) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    match unsafe { elements(array, "xpc_array_get_value") }.get(index) {
        Some(element) => element.as_raw(),
        None => violation("xpc_array_get_value: the index is beyond the end"),
    }
}

/// # Safety
///
/// As for [`borrow`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_get_type(object: *mut c_void) -> *const Type {
    // SAFETY: guaranteed by the caller.
    match unsafe { borrow(object, "xpc_get_type").0 } {
        Object::Array(_) => &raw const _xpc_type_array,
        Object::Dictionary(_) => &raw const _xpc_type_dictionary,
        _ => &raw const OTHER_TYPE,
    }
}

/// # Safety
///
/// The caller gives up its reference to `object`. The simulator aborts if no live XPC object has
/// this address.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn xpc_release(object: *mut c_void) {
    objects::expect_live(object, Kind::Xpc, "xpc_release");
    // SAFETY: `expect_live` has just found it. It was made as an Arc, and the caller gives up the
    // reference.
    unsafe { Arc::decrement_strong_count(object.cast::<Object>()) }
}

//! XPC dictionaries: ours to describe an interface with, and vmnet's to read.

use std::ffi::{CStr, CString, c_void};
use std::marker::PhantomData;
use std::ptr;

use super::ffi::{
    _xpc_type_array, _xpc_type_dictionary, Key, Object, xpc_array_get_count, xpc_array_get_string,
    xpc_array_get_value, xpc_dictionary_create, xpc_dictionary_get_string,
    xpc_dictionary_get_uint64, xpc_dictionary_get_uuid, xpc_dictionary_set_bool,
    xpc_dictionary_set_string, xpc_dictionary_set_uint64, xpc_dictionary_set_uuid, xpc_get_type,
    xpc_release,
};

/// An object with a reference of ours.
#[derive(Debug)]
pub(crate) struct Owned(Object);

// SAFETY: XPC objects are counted atomically; ours are not changed after they were made.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Owned {
    /// # Safety
    ///
    /// `object` is null or an XPC object with a reference that becomes ours.
    pub(crate) unsafe fn from_raw(object: Object) -> Option<Self> {
        (!object.is_null()).then(|| Self(object))
    }

    pub(crate) fn as_raw(&self) -> Object {
        self.0
    }

    pub(crate) fn borrow(&self) -> Borrowed<'_> {
        Borrowed(self.0, PhantomData)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the reference is ours, and this is its end.
        unsafe { xpc_release(self.0) }
    }
}

/// An empty dictionary to be filled.
#[derive(Debug)]
pub(crate) struct Dictionary(Owned);

impl Dictionary {
    pub(crate) fn new() -> Self {
        // SAFETY: no keys and no values. It is documented never to return null.
        Self(Owned(unsafe { xpc_dictionary_create(ptr::null(), ptr::null(), 0) }))
    }

    pub(crate) fn as_raw(&self) -> Object {
        self.0.0
    }

    pub(crate) fn set_u64(&mut self, key: Key, value: u64) {
        // SAFETY: the dictionary is ours, and the key one of vmnet's.
        unsafe { xpc_dictionary_set_uint64(self.0.0, key, value) }
    }

    pub(crate) fn set_bool(&mut self, key: Key, value: bool) {
        // SAFETY: as in `set_u64`.
        unsafe { xpc_dictionary_set_bool(self.0.0, key, value) }
    }

    pub(crate) fn set_str(&mut self, key: Key, value: &str) {
        // What the callers set has no zero byte; a name from outside ends at one.
        let value = value.split('\0').next().unwrap_or_default();
        let value = CString::new(value).expect("no zero byte is left");
        // SAFETY: as in `set_u64`; the text is copied.
        unsafe { xpc_dictionary_set_string(self.0.0, key, value.as_ptr()) }
    }

    pub(crate) fn set_uuid(&mut self, key: Key, value: &[u8; 16]) {
        // SAFETY: as in `set_u64`; the bytes are copied.
        unsafe { xpc_dictionary_set_uuid(self.0.0, key, value) }
    }
}

/// An object of vmnet's, during a block's call or while an [`Owned`] lives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Borrowed<'a>(Object, PhantomData<&'a Owned>);

impl<'a> Borrowed<'a> {
    /// # Safety
    ///
    /// `object` is null or an XPC object that lives as long as `'a`.
    pub(crate) unsafe fn from_raw(object: Object) -> Option<Self> {
        (!object.is_null()).then_some(Self(object, PhantomData))
    }

    pub(crate) fn as_raw(self) -> Object {
        self.0
    }

    fn is(self, class: *const c_void) -> bool {
        // SAFETY: the object lives.
        ptr::eq(unsafe { xpc_get_type(self.0) }, class)
    }

    fn is_dictionary(self) -> bool {
        self.is(&raw const _xpc_type_dictionary)
    }

    /// The number at `key`. XPC answers 0 for one that is not there and for another type, and none
    /// of vmnet's numbers is 0.
    pub(crate) fn get_u64(self, key: Key) -> Option<u64> {
        if !self.is_dictionary() {
            return None;
        }
        // SAFETY: a dictionary that lives, and one of vmnet's keys.
        let value = unsafe { xpc_dictionary_get_uint64(self.0, key) };
        (value != 0).then_some(value)
    }

    pub(crate) fn get_str(self, key: Key) -> Option<String> {
        if !self.is_dictionary() {
            return None;
        }
        // SAFETY: as in `get_u64`.
        copied(unsafe { xpc_dictionary_get_string(self.0, key) })
    }

    pub(crate) fn get_uuid(self, key: Key) -> Option<[u8; 16]> {
        if !self.is_dictionary() {
            return None;
        }
        // SAFETY: as in `get_u64`.
        let uuid = unsafe { xpc_dictionary_get_uuid(self.0, key) };
        // SAFETY: null, or the 16 bytes of a value in the dictionary.
        unsafe { uuid.as_ref() }.copied()
    }

    fn len(self) -> usize {
        if !self.is(&raw const _xpc_type_array) {
            return 0;
        }
        // SAFETY: an array that lives.
        unsafe { xpc_array_get_count(self.0) }
    }

    /// The strings of an array.
    pub(crate) fn strings(self) -> Vec<String> {
        (0..self.len())
            // SAFETY: an array that lives, and an index below its length.
            .filter_map(|index| copied(unsafe { xpc_array_get_string(self.0, index) }))
            .collect()
    }

    /// The elements of an array.
    pub(crate) fn elements(self) -> impl Iterator<Item = Borrowed<'a>> {
        (0..self.len()).filter_map(move |index| {
            // SAFETY: as in `strings`; the array holds a reference to its element.
            unsafe { Borrowed::from_raw(xpc_array_get_value(self.0, index)) }
        })
    }
}

/// The text at `text`, if there is one.
fn copied(text: *const std::ffi::c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, so a C string of XPC's that lives as long as its object; it is copied here.
    let text = unsafe { CStr::from_ptr(text) };
    Some(text.to_string_lossy().into_owned())
}

//! XPC dictionaries and arrays: those that the driver builds to describe an interface, and those of
//! vmnet's that it reads.
//!
//! The rules of ownership are those of xpc_object(3): a function with "create" or "copy" in its
//! name returns a reference that the caller must release, and one with "get" returns a borrowed
//! object.

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

/// An XPC object with one reference, which is released when this is dropped.
#[derive(Debug)]
pub(crate) struct Owned(Object);

// SAFETY: by xpc_object(3) the system may hold references of its own to any object, so XPC must
// count references atomically, and any thread may release ours.
unsafe impl Send for Owned {}
// SAFETY: only `Dictionary` changes an object, through `&mut self`, while it is the only owner.
// Through a shared `Owned` the driver only reads the object.
unsafe impl Sync for Owned {}

impl Owned {
    /// Takes ownership of a reference; `None` for null.
    ///
    /// # Safety
    ///
    /// `object` is null, or an XPC object. The caller gives up one reference to it.
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
        // SAFETY: `from_raw` and `Dictionary::new` have put one reference here, and this is the
        // only call that releases it.
        unsafe { xpc_release(self.0) }
    }
}

/// A dictionary that the driver builds.
#[derive(Debug)]
pub(crate) struct Dictionary(Owned);

impl Dictionary {
    /// Creates an empty dictionary.
    pub(crate) fn new() -> Self {
        // SAFETY: with a count of 0 no key and no value is read. Apple declares the result nonnull,
        // and it comes with one reference for us.
        Self(Owned(unsafe { xpc_dictionary_create(ptr::null(), ptr::null(), 0) }))
    }

    pub(crate) fn as_raw(&self) -> Object {
        self.0.0
    }

    pub(crate) fn set_u64(&mut self, key: Key, value: u64) {
        // SAFETY: `self` owns the dictionary, borrowed mutably. `key` is a C string: the callers
        // pass the values of vmnet's exported keys only. The value is a plain number.
        unsafe { xpc_dictionary_set_uint64(self.0.0, key, value) }
    }

    pub(crate) fn set_bool(&mut self, key: Key, value: bool) {
        // SAFETY: `self` owns the dictionary, borrowed mutably. `key` is the value of one of
        // vmnet's keys, so a C string. The value is a plain bool.
        unsafe { xpc_dictionary_set_bool(self.0.0, key, value) }
    }

    pub(crate) fn set_str(&mut self, key: Key, value: &str) {
        // The driver's own values have no zero byte. A name from a caller is cut at the first one.
        let value = value.split('\0').next().unwrap_or_default();
        let value = CString::new(value).expect("no zero byte is left");
        // SAFETY: `self` owns the dictionary, borrowed mutably. `key` is the value of one of
        // vmnet's keys, so a C string. XPC copies the text, which lives through the call.
        unsafe { xpc_dictionary_set_string(self.0.0, key, value.as_ptr()) }
    }

    pub(crate) fn set_uuid(&mut self, key: Key, value: &[u8; 16]) {
        // SAFETY: `self` owns the dictionary, borrowed mutably. `key` is the value of one of
        // vmnet's keys, so a C string. XPC copies the 16 bytes, which live through the call.
        unsafe { xpc_dictionary_set_uuid(self.0.0, key, value) }
    }
}

/// A borrowed XPC object: one of vmnet's during the call of a block, or that of an [`Owned`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Borrowed<'a>(Object, PhantomData<&'a Owned>);

impl<'a> Borrowed<'a> {
    /// Borrows an object; `None` for null.
    ///
    /// # Safety
    ///
    /// `object` is null, or an XPC object that lives as long as `'a` and is not changed meanwhile.
    pub(crate) unsafe fn from_raw(object: Object) -> Option<Self> {
        (!object.is_null()).then_some(Self(object, PhantomData))
    }

    pub(crate) fn as_raw(self) -> Object {
        self.0
    }

    /// Returns whether the object is of this XPC type.
    fn is(self, class: *const c_void) -> bool {
        // SAFETY: the object lives for `'a`, which `from_raw`'s caller or `Owned::borrow` keeps.
        ptr::eq(unsafe { xpc_get_type(self.0) }, class)
    }

    fn is_dictionary(self) -> bool {
        self.is(&raw const _xpc_type_dictionary)
    }

    /// Returns the number at `key`. It is `None` also for 0, because XPC returns 0 for a missing
    /// key and for a value of another type. None of vmnet's numbers is 0.
    pub(crate) fn get_u64(self, key: Key) -> Option<u64> {
        if !self.is_dictionary() {
            return None;
        }
        // SAFETY: the object is a dictionary, as just checked, and lives for `'a`. `key` is a C
        // string: the callers pass the values of vmnet's exported keys only.
        let value = unsafe { xpc_dictionary_get_uint64(self.0, key) };
        (value != 0).then_some(value)
    }

    /// Returns a copy of the string at `key`.
    pub(crate) fn get_str(self, key: Key) -> Option<String> {
        if !self.is_dictionary() {
            return None;
        }
        // SAFETY: the object is a dictionary, as just checked, and lives for `'a`. `key` is the
        // value of one of vmnet's keys, so a C string.
        copied(unsafe { xpc_dictionary_get_string(self.0, key) })
    }

    /// Returns a copy of the UUID at `key`.
    pub(crate) fn get_uuid(self, key: Key) -> Option<[u8; 16]> {
        if !self.is_dictionary() {
            return None;
        }
        // SAFETY: the object is a dictionary, as just checked, and lives for `'a`. `key` is the
        // value of one of vmnet's keys, so a C string.
        let uuid = unsafe { xpc_dictionary_get_uuid(self.0, key) };
        // SAFETY: XPC returned null, or a pointer to the 16 bytes of a value in the dictionary,
        // which lives for `'a`. The bytes are copied before this function returns.
        unsafe { uuid.as_ref() }.copied()
    }

    /// Returns the number of elements of an array; 0 for another type.
    fn len(self) -> usize {
        if !self.is(&raw const _xpc_type_array) {
            return 0;
        }
        // SAFETY: the object is an array, as just checked, and lives for `'a`.
        unsafe { xpc_array_get_count(self.0) }
    }

    /// Returns copies of the strings of an array.
    pub(crate) fn strings(self) -> Vec<String> {
        (0..self.len())
            // SAFETY: an index exists only if `len` has found an array. The array lives for `'a`
            // and is not changed, so the index is below its length.
            .filter_map(|index| copied(unsafe { xpc_array_get_string(self.0, index) }))
            .collect()
    }

    /// Returns the elements of an array.
    pub(crate) fn elements(self) -> impl Iterator<Item = Borrowed<'a>> {
        (0..self.len()).filter_map(move |index| {
            // SAFETY: an index exists only if `len` has found an array, which lives for `'a` and is
            // not changed. It holds a reference to each element, so an element lives for `'a` as
            // well.
            unsafe { Borrowed::from_raw(xpc_array_get_value(self.0, index)) }
        })
    }
}

/// Copies the text that an XPC function has returned; `None` for null.
fn copied(text: *const std::ffi::c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the callers pass what `xpc_dictionary_get_string` or `xpc_array_get_string` returned.
    // It is not null, so it is a C string that lives as long as its object, which the callers
    // borrow. It is copied before this function returns.
    let text = unsafe { CStr::from_ptr(text) };
    Some(text.to_string_lossy().into_owned())
}

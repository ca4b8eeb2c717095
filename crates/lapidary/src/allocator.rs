//! Where memory comes from.
//!
//! Each pass allocates tensors of many sizes and frees them again. An allocator that keeps pages for each size holds
//! about twice what a pass needs at its peak; this one joins what is free, keeps it for the next pass, and asks for
//! large pages, without which reading the weights of a token takes 1.4 times as long.

use lapidary_kernels::memory::Counting;

#[cfg(not(target_env = "msvc"))]
type Allocator = tikv_jemallocator::Jemalloc;
#[cfg(target_env = "msvc")]
type Allocator = std::alloc::System;

#[cfg(not(target_env = "msvc"))]
const ALLOCATOR: Allocator = tikv_jemallocator::Jemalloc;
#[cfg(target_env = "msvc")]
const ALLOCATOR: Allocator = std::alloc::System;

/// What it holds is counted.
#[global_allocator]
static COUNTED: Counting<Allocator> = Counting(ALLOCATOR);

/// Settings that the allocator reads when it starts. Nothing goes back to the system: a pass wants the pages that the
/// one before freed, and cleared pages cost a tenth of a training step. One arena, large pieces too, so that what one
/// thread freed another can have.
#[cfg(not(target_env = "msvc"))]
const SETTINGS: &core::ffi::CStr =
    c"dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1,oversize_threshold:0,thp:always";

/// A pointer to the settings, as the allocator looks for it.
#[cfg(not(target_env = "msvc"))]
#[repr(transparent)]
struct Pointer(*const core::ffi::c_char);

// SAFETY: what it points to never changes.
#[cfg(not(target_env = "msvc"))]
unsafe impl Sync for Pointer {}

// SAFETY: the name belongs to the allocator, which takes it for such a pointer.
#[cfg(not(target_env = "msvc"))]
#[unsafe(export_name = "_rjem_malloc_conf")]
static POINTER: Pointer = Pointer(SETTINGS.as_ptr());

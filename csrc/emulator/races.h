// Finds races between the threads of a block, also those that change no result: two accesses to the same bytes, one of
// them a write, by two threads that no barrier separates.
//
// A kernel that is compiled with -fsanitize=thread calls a function before every access to memory. ThreadSanitizer's own
// knows threads of the operating system; races.cpp has the same functions for emulated ones. Not looked at: memory that
// several blocks share, and copies by memcpy.
#pragma once

namespace headrace::emulator {

// What block.cpp reports; each costs nothing worth mentioning where no kernel asks.
void race_block_begins(unsigned threads);
void race_block_met();              // all threads of the block were at a barrier
void race_warp_met(unsigned warp);  // lanes of a warp were

}  // namespace headrace::emulator

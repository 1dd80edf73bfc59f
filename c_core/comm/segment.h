/* The group's shared memory as a process sees it. */
#ifndef SL_COMM_SEGMENT_H
#define SL_COMM_SEGMENT_H

#include "comm/layout.h"

typedef struct sl_segment sl_segment;

/* Makes the memory of a group and writes its handle. Nameless: it is gone when the last process that has it is. */
sl_status sl_segment_create(int size, size_t buffer_bytes, sl_segment **segment, char handle[SL_COMM_TEXT]);

/* Maps the memory that the handle names, after checking that it is what the handle says. Ranks that are threads of one
 * process share the mapping. */
sl_status sl_segment_open(const char *handle, int size, sl_segment **segment);

void sl_segment_close(sl_segment *segment);

sl_header *sl_segment_header(sl_segment *segment);

/* Marks the rank's process as living, and asks whether another's does. The mark goes when the process does. */
sl_status sl_segment_mark_presence(sl_segment *segment, int rank);
bool sl_segment_is_present(sl_segment *segment, int rank);

#endif

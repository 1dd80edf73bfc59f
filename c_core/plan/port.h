/* The links of one rank: messages one after the other, and reductions in the time that messages leave. Calls come in
 * the order of the rank's work, which is also the order in time. */
#ifndef SL_PLAN_PORT_H
#define SL_PLAN_PORT_H

#include <stdbool.h>
#include <stdint.h>

typedef struct sl_reduction {
  int64_t stage;
  double left_s; /* that it still needs of a link that carries nothing else */
  double begin_s, end_s;
} sl_reduction;

typedef struct sl_port {
  bool shared;         /* by messages in both directions and reductions */
  double reduce_share; /* of the port's time, while a message is under way that was sent after a reduction was queued */
  double free_s[2];    /* when the messages so far have left: by direction, or [0] where the port is shared */
  double message_end_s; /* when the last message that shares has left */
  double now_s;         /* reductions are worked out up to here */
  sl_reduction *queue;  /* room for one for each stage of the rank */
  int64_t first, count; /* of the queue: not yet done, and in all */
} sl_port;

/* Reductions get `rate` of the port until `until_s`. */
static inline void sl_port_serve(sl_port *port, double until_s, double rate) {
  while (port->first < port->count && port->now_s < until_s && rate > 0) {
    sl_reduction *reduction = &port->queue[port->first];
    if (reduction->begin_s < 0) reduction->begin_s = port->now_s;
    double end = port->now_s + reduction->left_s / rate;
    if (end > until_s) {
      double served = (until_s - port->now_s) * rate;
      reduction->left_s = served < reduction->left_s ? reduction->left_s - served : 0;
      break;
    }
    reduction->end_s = port->now_s = end;
    ++port->first;
  }
  if (port->now_s < until_s) port->now_s = until_s;
}

static inline void sl_port_advance(sl_port *port, double until_s) {
  sl_port_serve(port, port->message_end_s, port->reduce_share);
  sl_port_serve(port, until_s, 1);
}

/* Sends a message that is ready at ready_s and occupies an idle link for occupied_s. Gives when it sets out, and by
 * left_s when it has left. */
static inline double sl_port_send(sl_port *port, int direction, double ready_s, double occupied_s, double *left_s) {
  double *link_free = &port->free_s[port->shared ? 0 : direction];
  double begin = ready_s > *link_free ? ready_s : *link_free;
  bool shares = port->shared && port->count > 0;
  if (shares) {
    occupied_s /= 1 - port->reduce_share;
    sl_port_advance(port, begin);
    port->message_end_s = begin + occupied_s;
  }
  *left_s = *link_free = begin + occupied_s;
  return begin;
}

/* Queues a reduction whose gradients are ready at ready_s. It waits for the messages that were sent before it. */
static inline void sl_port_queue(sl_port *port, int64_t stage, double ready_s, double needed_s) {
  double begin = port->shared && port->free_s[0] > ready_s ? port->free_s[0] : ready_s;
  sl_port_advance(port, begin);
  port->queue[port->count++] = (sl_reduction){stage, needed_s, -1, -1};
}

/* When the last reduction is done; 0 without any. No message follows. */
static inline double sl_port_finish(sl_port *port) {
  sl_port_serve(port, port->message_end_s, port->reduce_share);
  sl_port_serve(port, 1e300, 1);
  return port->count ? port->queue[port->count - 1].end_s : 0;
}

#endif

package gate

import (
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/policy"
)

// handshakeRefusal tells why the guest's TLS handshake with the gate failed. The
// guest's programs see their own error alone, since there is no HTTP yet: these
// words are for the log, and for the summary at a bottle's end.
func (g *Gate) handshakeRefusal(err error, alert byte, t *tunnel) *Refusal {
	var f *fault.Error
	switch {
	case alertsAboutCertificate[alert] != "":
		return g.rejectsCA(t, "alert: "+alertsAboutCertificate[alert])
	case errors.As(err, &f):
		return refused(f.Code, t.host, t.port, f.Msg, f.Hint)
	case strings.Contains(err.Error(), "unsupported application protocols"):
		return refused("guest_needs_http2", t.host, t.port,
			"the client speaks HTTP/2 alone, and an inspected host is served over HTTP/1.1",
			"let the client use HTTP/1.1, or "+policy.HowToUninspect(g.cfg.Bottle, t.host))
	}
	if why := rejection(err); why != "" {
		return g.rejectsCA(t, why)
	}
	return refused("guest_handshake_failed", t.host, t.port, "TLS handshake with the guest: "+err.Error(), "")
}

func (g *Gate) rejectsCA(t *tunnel, why string) *Refusal {
	return refused("guest_rejects_ca", t.host, t.port,
		"the client does not take the certificate of the bottle's authority ("+why+"): it pins the host's own, or has a list of authorities of its own",
		policy.HowToUninspect(g.cfg.Bottle, t.host))
}

// alertsAboutCertificate, RFC 8446 section 6.2, in the words of crypto/tls.
var alertsAboutCertificate = map[byte]string{
	42: "bad certificate", 43: "unsupported certificate", 44: "revoked certificate", 45: "expired certificate",
	46: "unknown certificate", 48: "unknown certificate authority",
}

// watched looks for an alert in the clear among the records of a handshake.
// OpenSSL sends one when it does not take the certificate of a TLS 1.3 server,
// which has keys by then: crypto/tls sees a record that it cannot decrypt.
type watched struct {
	*replayed
	head  [7]byte // of a record; with what an alert says
	have  int
	skip  int  // bytes of the record still to come
	alert byte // 0 is close_notify, and what stands here before any
	over  bool // the handshake is
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.replayed.Read(p)
	for b := p[:n]; len(b) > 0 && !w.over; {
		if w.skip > 0 {
			k := min(w.skip, len(b))
			w.skip -= k
			b = b[k:]
			continue
		}
		w.head[w.have] = b[0]
		w.have++
		b = b[1:]
		size := int(w.head[3])<<8 | int(w.head[4])
		alert := w.head[0] == recordAlert && size == 2 // an encrypted one is longer
		switch {
		case w.have == 5 && !alert:
			w.have, w.skip = 0, size
		case w.have == 7:
			w.have, w.alert = 0, w.head[6]
		}
	}
	return n, err
}

// rejection tells an end of the connection that is about the certificate: an
// alert that says so, or none at all.
func rejection(err error) string {
	var op *net.OpError
	switch {
	case errors.As(err, &op) && op.Op == "remote error":
		// crypto/tls has no exported type for an alert that was received.
		if text := op.Err.Error(); strings.Contains(text, "certificate") {
			return "alert: " + strings.TrimPrefix(text, "tls: ")
		}
		return ""
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "it hung up when it saw it"
	}
	return ""
}

// unused looks at the end of a connection inside TLS over which no request came.
// Many programs look at pins only once the handshake is over, and hang up at
// once; one that hangs up later had opened a connection ahead of need.
func (c *httpConn) unused(err error) {
	if c.tunnel == nil || c.tunnel.scheme != "https" || time.Since(c.since) > c.gate.limits.rejects {
		return
	}
	c.mu.Lock()
	begun := c.begun
	c.begun = true // tell it once
	c.mu.Unlock()
	if why := rejection(err); !begun && why != "" && c.tunnel.flow.cut() == nil {
		f, e := c.gate.rejectsCA(c.tunnel, why), c.tunnel.opened
		e.Code, e.Reason = f.Code, f.Reason
		c.gate.end(e, c.since)
	}
}

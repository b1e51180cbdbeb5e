package gate

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strconv"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/policy"
)

// Refusal is an answer that the gate gives itself. It is an error, too, so that
// it can come out of a dial.
//
// A decision is always a 4xx: agents take it as final. 502, 504 and 503 are for
// failures that a retry may mend, since agents repeat those for minutes.
type Refusal struct {
	Status int    `json:"-"`
	Code   string `json:"code"`
	Host   string `json:"host"`
	Port   int    `json:"port"`
	Reason string `json:"reason"`
	Hint   string `json:"hint"` // how to allow it, or what to do instead
	// Retry is the Retry-After header in seconds; 0 leaves it out.
	Retry int `json:"-"`
}

func (f *Refusal) Error() string { return f.Reason }

func badRequest(reason string) *Refusal {
	return &Refusal{Status: http.StatusBadRequest, Code: "bad_request", Reason: reason}
}

// refused is a decision.
func refused(code, host string, port int, reason, hint string) *Refusal {
	return &Refusal{Status: http.StatusForbidden, Code: code, Host: host, Port: port, Reason: reason, Hint: hint}
}

func denied(d policy.Decision, host string, port int) *Refusal {
	return refused(d.Code, host, port, d.Reason, d.Hint)
}

// failed is a trouble of the network between the gate and the host.
func failed(code, host string, port int, reason string) *Refusal {
	return &Refusal{Status: http.StatusBadGateway, Code: code, Host: host, Port: port, Reason: reason,
		Hint: "the host is allowed; try again later"}
}

func timedOut(host string, port int, reason string) *Refusal {
	f := failed("upstream_timeout", host, port, reason)
	f.Status = http.StatusGatewayTimeout
	return f
}

// decision tells the guest's programs apart what was decided and what failed.
func (f *Refusal) decision() string {
	if f.Status >= 500 {
		return audit.Failed
	}
	return audit.Deny
}

func (f *Refusal) body() []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	// A struct of strings and a number always encodes.
	_ = enc.Encode(struct {
		Error *Refusal `json:"error"`
	}{f})
	return b.Bytes()
}

func (f *Refusal) header(h http.Header, length int) {
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(length))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Bottle-Decision", f.decision())
	if f.Retry > 0 {
		h.Set("Retry-After", strconv.Itoa(f.Retry))
	}
}

// write answers through net/http. last closes the connection afterwards.
func (f *Refusal) write(w http.ResponseWriter, last bool) {
	body := f.body()
	f.header(w.Header(), len(body))
	if last {
		w.Header().Set("Connection", "close")
	}
	w.WriteHeader(f.Status)
	_, _ = w.Write(body)
}

// response is the answer to req as if an origin had given it.
func (f *Refusal) response(req *http.Request) *http.Response {
	body := f.body()
	resp := &http.Response{StatusCode: f.Status, ProtoMajor: 1, ProtoMinor: 1, Request: req,
		Header: make(http.Header), ContentLength: int64(len(body)), Body: io.NopCloser(bytes.NewReader(body))}
	f.header(resp.Header, len(body))
	return resp
}

// raw is the answer as bytes, for a connection that net/http does not serve any
// more or not yet.
func (f *Refusal) raw() []byte {
	resp := f.response(nil)
	resp.Close = true
	var b bytes.Buffer
	_ = resp.Write(&b)
	return b.Bytes()
}
